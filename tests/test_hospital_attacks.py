"""What hostile or broken senders do to the gateway: refused or quarantined; it goes on, within its memory."""

from __future__ import annotations

import ipaddress
import random
import select
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hospital_node import (
    CT,
    DEFLATED,
    EXPLICIT,
    association,
    check_kept,
    gateway,
    gateway_process,
    header,
    leaks,
    node_settings,
    rows_of,
    send,
    settings_dict,
    slices,
)
from hospital_peers import HOST, required, wait_for
from pydicom.uid import UID
from pynetdicom import _config

import medseg
from medseg_pipelines.hospital import dimse, entrance, scp
from medseg_pipelines.hospital import gateway as gateway_module
from medseg_pipelines.hospital.database import refusals
from medseg_pipelines.hospital.node import open_node
from medseg_pipelines.hospital.settings import NodeSettings, PeerSettings, TlsSettings

NOT_UNDERSTOOD = 0xC000
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
VERIFICATION = "1.2.840.10008.1.1"
# beyond what it had before: a handful of PDUs of 128 KiB, threads, and what Python keeps
MOST_GROWTH = 150e6


@dataclass(frozen=True)
class Attacked:
    """A gateway in a process of its own, and what is known of it."""

    port: int
    process: psutil.Process
    root: Path
    settings: NodeSettings
    rss: int

    def check(self) -> None:
        """It lives, serves, is not larger, and has told nobody's name."""
        assert send(self.port, slices(self.root / "well", 1)) == [0]
        assert self.process.memory_info().rss - self.rss < MOST_GROWTH
        assert leaks(self.root / "node", (self.root / "log").read_text()) == []

    def refused(self) -> list[str]:
        """The reasons of all that was refused."""
        node = open_node(self.settings, "web")
        check_kept(node)
        reasons = [row.reason for row in rows_of(node, refusals)]
        node.close()
        return reasons


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    root = tmp_path_factory.mktemp("attacked")
    values = settings_dict(root, gateway={"handshake_s": 1.0, "idle_s": 2.0})
    with gateway_process(root, values) as process:
        watched = psutil.Process(process.pid)
        port = values["gateway"]["port"]
        assert send(port, slices(root / "well", 1)) == [0]
        yield Attacked(port, watched, root, NodeSettings.model_validate(values), watched.memory_info().rss)


def raw(path: Path, change: Callable[[bytes], bytes], *, rows: int = 8, **elements: object) -> Path:
    """A file whose data set is not what a library would write."""
    made = header(9, rows=rows)
    for name, value in elements.items():
        setattr(made, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    path.write_bytes(change(path.read_bytes()))
    return path


def depth_bomb(content: bytes, depth: int = 20_000) -> bytes:
    # (0040,A730) SQ of undefined length, in it one item of undefined length, and so on
    at = content.index(b"\xe0\x7f\x10\x00OW")
    return (
        content[:at]
        + (b"\x40\x00\x30\xa7SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth)
        + content[at:]
    )


@pytest.mark.parametrize(
    ("change", "elements", "reason"),
    [
        (lambda content: content[:-40], {}, "cut off"),
        (lambda content: content[:500] + content[530:], {}, "damaged|cut off|expected"),
        (depth_bomb, {}, "more than 64 sequences"),
        (lambda content: content, {"Rows": 65535, "Columns": 65535, "NumberOfFrames": 4000}, "voxels|cut off"),
        (lambda content: content, {"Rows": 65535, "Columns": 65535}, "voxels"),
        (
            lambda content: content.replace(b"1.2.826.0.1.3680043.8.498.7.9", b"1.2.826.0/../../43.8.498.7.9x"),
            {},
            "UID",
        ),
    ],
    ids=["cut off", "bytes missing", "depth bomb", "frames without end", "65535 squared", "path as series UID"],
)
def test_a_hostile_file_is_quarantined(
    attacked: Attacked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytes], bytes],
    elements: dict[str, object],
    reason: str,
) -> None:
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
    file = raw(tmp_path / "x.dcm", change, **elements)
    before = len(attacked.refused())
    assert send(attacked.port, [file]) == [NOT_UNDERSTOOD]
    (told,) = attacked.refused()[before:]
    assert any(words in told for words in reason.split("|"))
    attacked.check()


@pytest.mark.parametrize("uid", ["../../x", "/etc/passwd", "Tweety^Bird", "1..2", ""])
def test_a_uid_that_is_none_is_refused(attacked: Attacked, uid: str) -> None:
    made = header(9)
    made.SOPInstanceUID = UID(uid)
    outside = set(attacked.root.parent.iterdir())
    try:
        answers = send(attacked.port, [made])
    except (ValueError, AttributeError):
        # pynetdicom itself does not send it
        assert uid == ""
        return
    assert answers[0] != 0
    assert set(attacked.root.parent.iterdir()) == outside
    attacked.check()


def test_deflated_data_sets_are_not_negotiated(attacked: Attacked) -> None:
    with association(attacked.port, contexts=[(CT, DEFLATED), (VERIFICATION, EXPLICIT)]) as made:
        assert [context.abstract_syntax for context in made.accepted_contexts] == [VERIFICATION]
    with association(attacked.port, contexts=[(CT, DEFLATED)]) as made:
        assert not made.is_established
    attacked.check()


def test_a_deflated_bomb_under_another_name_is_quarantined(
    attacked: Attacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = deflater.compress(bytes(2**26)) + deflater.flush()

    def inflated(content: bytes) -> bytes:
        return content[: content.index(b"\x08\x00\x16\x00UI")] + bomb

    assert send(attacked.port, [raw(tmp_path / "x.dcm", inflated)]) == [NOT_UNDERSTOOD]
    attacked.check()


@pytest.mark.parametrize(
    "content",
    [
        random.Random(1).randbytes(100_000),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
        b"\x01\x00\xff\xff\xff\xff" + b"A" * 1000,
        b"\x01\x00\x00\x00\x00\x00",
        b"\x04\x00\x00\x00\x00\x10" + b"\0" * 16,
        b"\x01\x00\x00\x00\x01\x00" + random.Random(2).randbytes(256),
        b"\x01\x00\x00\x00\x00\xec\0\x01\0\0" + b"MEDSEG".ljust(16) + b"SCANNER".ljust(16) + b"\xff" * 200,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    ],
    ids=["random", "HTTP", "huge request", "empty request", "data first", "random request", "random items", "TLS"],
)
def test_garbage_before_an_association_is_cut_off(attacked: Attacked, content: bytes) -> None:
    with socket.create_connection((HOST, attacked.port), 10) as made:
        made.settimeout(20)
        with suppress(ConnectionError):
            made.sendall(content)
            while made.recv(4096):
                continue
    attacked.check()


def pdv(context: int, command: bytes) -> bytes:
    """A PDU of one whole command."""
    return struct.pack(">BBLLBB", 4, 0, len(command) + 6, len(command) + 2, context, 3) + command


def element(number: int, value: int) -> bytes:
    """Of a command: a US in group 0."""
    return struct.pack("<HHLH", 0, number, 2, value)


# C-STORE, message 1, a data set follows
COMMAND = element(0x100, 1) + element(0x110, 1) + element(0x800, 0)


@pytest.mark.parametrize(
    "content",
    [
        random.Random(3).randbytes(10_000),
        b"\x04\x00\xff\xff\xff\xf0" + b"B" * 300_000,
        b"\x04\x00\x00\x00\x00\x06\x00\x00\x00\x02\x01\x03",
        b"\x04\x00\x00\x00\x00\x05\x00\x00\x00\x01\x01",
        b"\x04\x00\x00\x00\x00\x16\x00\x00\x00\x12\x01\x03" + random.Random(4).randbytes(16),
        pdv(255, COMMAND),
        pdv(1, COMMAND),
        pdv(1, COMMAND[:-2] + b"\x01\x01"),
        b"\x01\x00\x00\x00\x00\x44" + bytes(0x44),
    ],
    ids=[
        *("random", "huge PDU", "empty command", "empty value", "random command", "no such context", "no UIDs"),
        *("no data set", "second request"),
    ],
)
def test_garbage_in_an_association_ends_it(attacked: Attacked, content: bytes) -> None:
    with association(attacked.port) as made:
        assert made.is_established
        wire = made.dul.socket.socket  # type: ignore[union-attr]
        with suppress(OSError):
            wire.sendall(content)  # type: ignore[union-attr]
        wait_for(lambda: not made.is_established)
    attacked.check()


def test_a_flood_of_reports_is_cut_off(attacked: Attacked) -> None:
    def uid(number: int, value: bytes) -> bytes:
        return struct.pack("<HHL", 0, number, len(value)) + value

    # N-EVENT-REPORT on storage commitment, without a data set
    report = (
        *(uid(0x2, b"1.2.840.10008.1.20.1"), element(0x100, 0x100), element(0x110, 1), element(0x800, 0x0101)),
        *(uid(0x1000, b"1.2.840.10008.1.20.1.1"), element(0x1002, 1)),
    )
    flood = pdv(1, b"".join(report)) * (scp.MOST_REPORTS + 1)
    before = attacked.refused()
    with association(attacked.port) as made:
        wire = made.dul.socket.socket  # type: ignore[union-attr]
        with suppress(OSError):
            wire.sendall(flood)  # type: ignore[union-attr]
        wait_for(lambda: not made.is_established)
    wait_for(lambda: attacked.refused()[len(before) :] == [f"more than {scp.MOST_REPORTS} reports"])
    attacked.check()


def spoken(port: int, files: list[Path]) -> list[bytes]:
    """What a sender says while it sends files, one piece for each answer that it waits for."""
    said: list[bytes] = []

    def pass_on(server: socket.socket) -> None:
        ours, _ = server.accept()
        with ours, socket.create_connection((HOST, port)) as theirs:
            while piece := ours.recv(65536):
                said.append(piece)
                theirs.sendall(piece)
                ready, _, _ = select.select([ours, theirs], [], [], 10)
                if theirs in ready:
                    ours.sendall(theirs.recv(65536))

    with socket.create_server((HOST, 0)) as server:
        between = threading.Thread(target=pass_on, args=(server,), daemon=True)
        between.start()
        assert send(server.getsockname()[1], list(files)) == [0] * len(files)
        between.join(20)
    return said


def changed(said: list[bytes], rng: random.Random) -> list[bytes]:
    """The same with some bytes changed, mostly of the heads; half of the time the association is asked for well."""
    pieces = []
    for n, piece in enumerate(said):
        made = bytearray(piece)
        for _ in range(rng.choice([0, 1, 1, 2, 5]) if n or rng.random() < 0.5 else 0):
            at = rng.randrange(len(made) if rng.random() < 0.3 else min(len(made), 120))
            made[at] = rng.choice([0, 1, 255, rng.randrange(256)])
        pieces.append(bytes(made))
    return pieces


def test_changed_bytes_anywhere_harm_nobody(attacked: Attacked, tmp_path: Path) -> None:
    said = spoken(attacked.port, slices(tmp_path / "ct", 2))
    rng = random.Random(0)

    def say(pieces: list[bytes]) -> None:
        with suppress(OSError), socket.create_connection((HOST, attacked.port), 5) as made:
            made.settimeout(0.5)
            for piece in pieces:
                made.sendall(piece)
                with suppress(TimeoutError):
                    made.recv(65536)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(say, [changed(said, rng) for _ in range(80)]))
    incoming = attacked.settings.folder / "incoming"
    wait_for(lambda: not list(incoming.iterdir()))
    attacked.check()


def test_a_command_without_end_is_cut_off(attacked: Attacked) -> None:
    fragment = struct.pack(">BBLLBB", 4, 0, 100_006, 100_002, 1, 1) + bytes(100_000)
    with association(attacked.port) as made:
        wire = made.dul.socket.socket  # type: ignore[union-attr]
        with suppress(OSError):
            for _ in range(1000):
                wire.sendall(fragment)  # type: ignore[union-attr]
        wait_for(lambda: not made.is_established)
    attacked.check()


def test_silent_connections_keep_nobody_out(attacked: Attacked) -> None:
    begun = time.monotonic()
    attacked.check()
    alone_s = time.monotonic() - begun
    with ExitStack() as kept:
        silent = [kept.enter_context(socket.create_connection((HOST, attacked.port), 10)) for _ in range(50)]
        # half of them have begun to ask
        for one in silent[::2]:
            one.sendall(b"\x01\x00\x00")
        threads, begun = attacked.process.num_threads(), time.monotonic()
        attacked.check()
        # a full queue of the operating system costs seconds, a time limit of one of them 50; the machine may be busy
        assert time.monotonic() - begun < 5 + alone_s
        assert attacked.process.num_threads() < threads + 10
        for one in silent:
            one.settimeout(20)
            assert one.recv(1) == b""


def test_a_crash_leaves_no_memory_on_the_disk(attacked: Attacked) -> None:
    limits = Path(f"/proc/{attacked.process.pid}/limits").read_text()
    (core,) = [line.split() for line in limits.splitlines() if line.startswith("Max core file size")]
    assert core[4:6] == ["0", "0"]


def test_a_large_file_is_never_in_memory(attacked: Attacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
    side = 8192
    file = raw(tmp_path / "x.dcm", lambda content: content, Rows=side, Columns=side, PixelData=bytes(2 * side**2))
    before = most_memory(attacked.process)
    assert send(attacked.port, [file]) == [0]
    assert file.stat().st_size > 2 * 64e6
    assert most_memory(attacked.process) - before < 64e6
    attacked.check()


def most_memory(process: psutil.Process) -> int:
    """The most that a process has ever held, in bytes."""
    (line,) = [x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_a_request_may_come_byte_by_byte(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as server:
        asking = threading.Thread(target=send, args=(server.getsockname()[1], slices(tmp_path / "ct", 1)))
        asking.start()
        heard, _ = server.accept()
        request = heard.recv(65536)
        heard.close()
        asking.join()
    with (
        gateway(node_settings(tmp_path)) as node,
        socket.create_connection((HOST, node.settings.gateway.port), 10) as made,
    ):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for n in range(len(request)):
            made.sendall(request[n : n + 1])
        # A-ASSOCIATE-AC
        assert made.recv(1) == b"\2"


def test_where_no_file_can_be_opened_the_oldest_connection_makes_place() -> None:
    class Full:
        def accept(self) -> None:
            raise OSError(24, "Too many open files")

        def setblocking(self, flag: bool) -> None:
            return

    told: list[str] = []
    made = entrance.Entrance(
        Full(),  # type: ignore[arg-type]
        tls=None,
        handshake_s=1.0,
        knows=lambda _: True,
        judge=lambda _: entrance.Verdict.WELCOME,
        admit=lambda _: None,
        refused=told.append,
    )
    ours, theirs = socket.socketpair()
    waiting = entrance._Pending(ours, ("10.1.2.3", 1), 0.0)
    made._pending[ours.fileno()] = waiting
    made._selector.register(ours, 1)
    assert not made._accept()
    assert told == ["10.1.2.3: another connection needs its place"]
    theirs.settimeout(10)
    assert theirs.recv(1) == b""
    theirs.close()


def test_more_connections_than_may_wait_push_the_oldest_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrance, "MOST_PENDING", 3)
    with gateway(node_settings(tmp_path, gateway={"handshake_s": 60.0})) as node, ExitStack() as kept:
        port = node.settings.gateway.port
        silent = [kept.enter_context(socket.create_connection((HOST, port), 10)) for _ in range(4)]
        silent[0].settimeout(20)
        assert silent[0].recv(1) == b""
        assert send(port, slices(tmp_path / "ct", 1)) == [0]


def test_a_slow_sender_does_not_hold_its_place(tmp_path: Path) -> None:
    with (
        gateway(node_settings(tmp_path, gateway={"idle_s": 0.5, "most_associations": 1})) as node,
        association(node.settings.gateway.port) as made,
    ):
        port = node.settings.gateway.port
        # a PDU of which no more than its head comes
        made.dul.socket.socket.sendall(b"\x04\x00\x00\x01\x00\x00\x00")  # type: ignore[union-attr]
        wait_for(lambda: send(port, slices(tmp_path / "ct", 1)) == [0])


@pytest.mark.parametrize(
    ("network", "address", "is_inside"),
    [
        ("10.1.0.0/16", "10.1.2.3", True),
        ("10.1.0.0/16", "10.2.2.3", False),
        ("10.1.2.3", "::ffff:10.1.2.3", True),
        ("fd00::/8", "fd00::1%eth0", True),
        ("fd00::/8", "10.1.2.3", False),
        (None, "10.1.2.3", True),
    ],
)
def test_networks_hold_addresses_of_both_kinds(network: str | None, address: str, is_inside: bool) -> None:
    allowed = None if network is None else ipaddress.ip_network(network)
    assert gateway_module._inside(allowed, address) == is_inside


# ---- TLS


@dataclass(frozen=True)
class Certificates:
    """An authority, and what it has signed for `localhost`: PEM files."""

    authority: Path
    certificate: Path
    key: Path

    @property
    def tls(self) -> TlsSettings:
        return TlsSettings(certificate=self.certificate, key=self.key, authority=self.authority)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def make_certificates(folder: Path) -> Certificates:
    openssl = required("openssl", "openssl")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], check=True, cwd=folder, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    run("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=hospital")
    run("req", *new[:-2], "-keyout", "node.key", "-out", "node.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    run("x509", "-req", "-in", "node.csr", "-out", "node.pem", *sign)
    return Certificates(folder / "ca.pem", folder / "node.pem", folder / "node.key")


def tls_values(certificates: Certificates, *, mutual: bool) -> dict[str, object]:
    values = {"certificate": str(certificates.certificate), "key": str(certificates.key)}
    return {"tls": values | ({"authority": str(certificates.authority)} if mutual else {})}


def reaches(port: int, tls: TlsSettings | None) -> bool:
    peer = PeerSettings(ae_title="MEDSEG", host="localhost", port=port, tls=tls)
    try:
        with dimse.associated(peer, ae_title="SCANNER", contexts=[(VERIFICATION, [EXPLICIT])], timeout_s=10) as made:
            return made.send_c_echo().get("Status") == 0
    except dimse.PeerUnreachable:
        return False


def test_tls_is_spoken_and_nothing_else(tmp_path: Path, certificates: Certificates) -> None:
    with gateway(node_settings(tmp_path, gateway=tls_values(certificates, mutual=False))) as node:
        port = node.settings.gateway.port
        with ExitStack() as kept:
            # who never begins its handshake is in nobody's way
            for _ in range(50):
                kept.enter_context(socket.create_connection((HOST, port), 10))
            assert reaches(port, certificates.tls)
        assert not reaches(port, None)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(certificates.authority)
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError), socket.create_connection((HOST, port), 10) as connection:
            old.wrap_socket(connection, server_hostname="localhost")
        assert reaches(port, certificates.tls)


def test_mutual_tls_lets_nobody_in_without_a_certificate_of_the_authority(
    tmp_path: Path, certificates: Certificates
) -> None:
    anonymous = ssl.create_default_context(cafile=certificates.authority)
    strange = make_certificates(_new(tmp_path / "strange"))
    stranger = TlsSettings(certificate=strange.certificate, key=strange.key, authority=certificates.authority)
    with gateway(node_settings(tmp_path, gateway=tls_values(certificates, mutual=True))) as node:
        port = node.settings.gateway.port
        assert reaches(port, certificates.tls)
        assert not reaches(port, stranger)
        with association(port, tls=anonymous) as made:
            assert not made.is_established
        # nor a server that the client does not trust
        assert not reaches(port, strange.tls)


def test_files_come_by_tls_of_dcmtk(tmp_path: Path, certificates: Certificates) -> None:
    storescu = required("storescu", "dcmtk")
    slices(tmp_path / "ct")
    tls = ("+tls", str(certificates.key), str(certificates.certificate), "+cf", str(certificates.authority))
    with gateway(node_settings(tmp_path, gateway=tls_values(certificates, mutual=True))) as node:
        command = [storescu, *tls, "-aet", "SCANNER", "-aec", "MEDSEG", "+sd", "localhost"]
        subprocess.run([*command, str(node.settings.gateway.port), str(tmp_path / "ct")], check=True)
        assert len(check_kept(node)) == 5


def test_a_key_that_fits_no_certificate_is_told(tmp_path: Path, certificates: Certificates) -> None:
    other = make_certificates(_new(tmp_path / "other"))
    with pytest.raises(medseg.ConfigError, match="a key without a password that fits"):
        dimse.server_context(TlsSettings(certificate=certificates.certificate, key=other.key))


def test_a_peer_that_is_not_there_or_refuses_is_named(tmp_path: Path) -> None:
    with gateway(node_settings(tmp_path)) as node:
        port = node.settings.gateway.port
        for ae_title, host, words in (
            ("OTHER", HOST, "Called AE title not recognised"),
            ("MEDSEG", "no.such.host.invalid", "no such host"),
        ):
            peer = PeerSettings(ae_title=ae_title, host=host, port=port)
            with (
                pytest.raises(dimse.PeerUnreachable, match=words),
                dimse.associated(peer, ae_title="SCANNER", contexts=[(VERIFICATION, [EXPLICIT])], timeout_s=10),
            ):
                pass
    peer = PeerSettings(ae_title="MEDSEG", host=HOST, port=port)
    with (
        pytest.raises(dimse.PeerUnreachable, match="nothing answers"),
        dimse.associated(peer, ae_title="SCANNER", contexts=[(VERIFICATION, [EXPLICIT])], timeout_s=10),
    ):
        pass


def test_a_peer_that_falls_silent_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as server:
        peer = PeerSettings(ae_title="MEDSEG", host=HOST, port=server.getsockname()[1])
        begun = time.monotonic()
        with (
            pytest.raises(dimse.PeerUnreachable),
            dimse.associated(peer, ae_title="SCANNER", contexts=[(VERIFICATION, [EXPLICIT])], timeout_s=0.5),
        ):
            pass
        assert time.monotonic() - begun < 20


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
