"""Real peers of the hospital node on free ports of this machine: Orthanc and PostgreSQL; no test lives here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

HOST = "127.0.0.1"
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
POSTGRES = tuple(Path("/usr/lib/postgresql").glob("*/bin"))
START_S = 60.0


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def required(program: str, package: str, *, beside: tuple[Path, ...] = ()) -> str:
    """The path of a program. Skips the test where there is none; fails it there in continuous integration."""
    path = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, beside)]))
    if path is None:
        reason = f"no {program} on the path; install Debian's package `{package}`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def wait_for(what: Callable[[], Any], *, seconds: float = START_S, every_s: float = 0.05) -> Any:
    """The first true value of `what`. Raises `TimeoutError` where none comes in time."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still {value!r} after {seconds:.0f} s")
        time.sleep(every_s)
    return value


@dataclass
class OrthancPeer:
    """A PACS of its own folder: DIMSE at `dicom_port`, REST at `url`, DICOMweb at `dicomweb_url`; both on `HOST`."""

    folder: Path
    dicom_port: int
    http_port: int
    ae_title: str = "ORTHANC"
    settings: Mapping[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its REST interface, without a slash at the end."""
        return f"http://{HOST}:{self.http_port}"

    @property
    def dicomweb_url(self) -> str:
        """Of its DICOMweb services, without a slash at the end."""
        return f"{self.url}/dicom-web"

    def start(self) -> None:
        """It answers when this ends; what it had before is there again."""
        program = required("Orthanc", "orthanc")
        if not DICOMWEB.is_file():
            required("libOrthancDicomWeb.so", "orthanc-dicomweb")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "orthanc.json"
        file.write_text(json.dumps(self._configuration()), encoding="utf-8")
        with (self.folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen([program, str(file)], stdout=log, stderr=log)
        wait_for(self._answers)

    def stop(self) -> None:
        """It is gone when this ends, its data stay."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(START_S)
            self._process = None

    def instances(self) -> list[str]:
        """The SOP Instance UIDs of all it holds."""
        return sorted(found["MainDicomTags"]["SOPInstanceUID"] for found in self.get("/instances?expand"))

    def know(self, ae_title: str, port: int) -> None:
        """Tells it where another node is, on this machine: C-MOVE and storage commitment go there."""
        asked = {"AET": ae_title, "Host": HOST, "Port": port}
        httpx.put(f"{self.url}/modalities/{ae_title}", json=asked).raise_for_status()

    def clear(self) -> None:
        """Forgets all instances."""
        for study in self.get("/studies"):
            httpx.delete(f"{self.url}/studies/{study}").raise_for_status()

    def add(self, file: Path) -> None:
        """Gives it a file."""
        httpx.post(f"{self.url}/instances", content=file.read_bytes(), timeout=30).raise_for_status()

    def get(self, path: str) -> Any:
        """What its REST interface answers at `path`, from JSON."""
        answer = httpx.get(self.url + path, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def file_of(self, sop_instance_uid: str) -> bytes:
        """The DICOM file of an instance."""
        (found,) = httpx.post(f"{self.url}/tools/lookup", content=sop_instance_uid).json()
        answer = httpx.get(f"{self.url}/instances/{found['ID']}/file", timeout=30)
        answer.raise_for_status()
        return answer.content

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"Orthanc has ended: {(self.folder / 'orthanc.log').read_text()[-2000:]}")
        try:
            return httpx.get(f"{self.url}/system").is_success
        except httpx.TransportError:
            return False

    def _configuration(self) -> dict[str, Any]:
        return {
            "Name": "test",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": self.ae_title,
            "DicomPort": self.dicom_port,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowMove": True,
            "DicomModalitiesInDatabase": True,
            "UnknownSopClassAccepted": True,
            "OverwriteInstances": False,
            "Plugins": [str(DICOMWEB)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        } | dict(self.settings)


def new_orthanc(folder: Path, *, ae_title: str = "ORTHANC", settings: Mapping[str, Any] | None = None) -> OrthancPeer:
    """A PACS that has not been started; `settings`: more of Orthanc's own."""
    return OrthancPeer(folder, free_port(), free_port(), ae_title, settings or {})


@dataclass
class PostgresServer:
    """A PostgreSQL server with a folder of its own; it trusts everybody on this machine."""

    folder: Path
    port: int

    def create(self) -> None:
        """Makes its folder."""
        # its programs refuse to run as root, and its user must reach the folder
        self.folder.mkdir(mode=0o755)
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self._run("initdb", "--auth=trust", "--username=medseg", "--no-sync", "--encoding=UTF8", "--locale=C")

    def start(self) -> None:
        """It answers when this ends."""
        options = f"-p {self.port} -h {HOST} -k {self.folder} -c fsync=off -c max_connections=100"
        self._run("pg_ctl", "--wait", f"--options={options}", f"--log={self.folder}/log", "start")

    def stop(self) -> None:
        """It is gone when this ends, as after a power cut."""
        self._run("pg_ctl", "--wait", "--mode=immediate", "stop")

    def new_database(self) -> str:
        """The address of an empty database."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        return f"postgresql://medseg@{HOST}:{self.port}/{name}"

    def execute(self, statement: str) -> None:
        """Runs a statement that can be in no transaction."""
        engine = sa.create_engine(f"postgresql+pg8000://medseg@{HOST}:{self.port}/postgres")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    def _run(self, program: str, *arguments: str) -> None:
        path = required(program, "postgresql", beside=POSTGRES)
        other = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        subprocess.run(
            [*other, path, f"--pgdata={self.folder}/data", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
        )


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrthancPeer]:
    """A PACS that all tests share; a test begins with `clear()`. One that is stopped is started again by the test."""
    peer = new_orthanc(tmp_path_factory.mktemp("orthanc"))
    peer.start()
    yield peer
    peer.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A database server that all tests share."""
    required("initdb", "postgresql", beside=POSTGRES)
    with tempfile.TemporaryDirectory(prefix="medseg-postgres-") as folder:
        # of pytest's folders none may be entered by another user
        Path(folder).chmod(0o755)
        server = PostgresServer(Path(folder) / "server", free_port())
        server.create()
        server.start()
        yield server
        server.stop()


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> str:
    """The address of an empty database, for the `database` of a node's settings."""
    return postgres_server.new_database()
