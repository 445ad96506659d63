"""What services answer to STOW-RS, and what that means; the real one is in test_hospital_publish.py."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hospital_peers import HOST, free_port
from hospital_publishing import SEG_CLASS, certificates, write_seg

from medseg_pipelines.hospital.deliveries import Delivery
from medseg_pipelines.hospital.dimse import server_context
from medseg_pipelines.hospital.parcels import DestinationDownError, Parcel, Said
from medseg_pipelines.hospital.settings import DicomwebSettings, TlsSettings
from medseg_pipelines.hospital.stow import DicomwebSender

JSON = "application/dicom+json"


@pytest.fixture(scope="module")
def parcel(tmp_path_factory: pytest.TempPathFactory) -> Parcel:
    path = tmp_path_factory.mktemp("seg") / "seg.dcm"
    write_seg(path)
    uid = str(pydicom.dcmread(path).SOPInstanceUID)
    return Parcel(Delivery("job", "web", "dicom-seg", 0), path, "", SEG_CLASS, uid, "1.2.840.10008.1.2.1")


@dataclass
class Service:
    """Answers POST with `code` and `body`, GET with what it `has`; and what it was sent."""

    code: int = 200
    body: bytes = b""
    has: list[str] = field(default_factory=list)
    posted: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hangs: bool = False
    packed: str = ""


@contextmanager
def serving(service: Service, tls: Any = None) -> Iterator[str]:
    """The service on a port of this machine; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            # without a length there would be no body
            body = self.rfile.read(int(self.headers["Content-Length"]))
            service.posted.append((dict(self.headers), body))
            if service.hangs:
                self.close_connection = True
                return
            self._answer(service.code, service.body)

        def do_GET(self) -> None:
            found = [{"00080018": {"vr": "UI", "Value": [uid]}} for uid in service.has if uid in self.path]
            self._answer(200, json.dumps(found).encode())

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            if service.packed:
                self.send_header("Content-Encoding", service.packed)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http{'' if tls is None else 's'}://{HOST}:{server.server_address[1]}/web"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(url: str, *parcels: Parcel, **service: Any) -> list[tuple[Said, str]]:
    """What is told of each."""
    told: list[tuple[Said, str]] = []
    sender = DicomwebSender(DicomwebSettings(url=url, **service), timeout_s=5.0)
    sender.send(parcels, lambda _, said, reason: told.append((said, reason)))
    return told


def listed(uid: str, tag: str, **reasons: int) -> bytes:
    """An answer that names an object in the sequence of those stored (00081199) or failed (00081198)."""
    item = {"00081155": {"vr": "UI", "Value": [uid]}}
    for name, value in reasons.items():
        item[name.removeprefix("t")] = {"vr": "US", "Value": [value]}  # type: ignore[list-item]
    return json.dumps({tag: {"vr": "SQ", "Value": [item]}}).encode()


def test_an_answer_that_unfolds_to_gigabytes_is_not_unfolded(parcel: Parcel) -> None:
    bomb = gzip.compress(gzip.compress(bytes(2**26)))
    tracemalloc.start()
    with serving(Service(body=bomb, packed="gzip, gzip")) as url:
        ((said, _),) = send(url, parcel)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said is Said.LATER
    assert most < 2**25


def test_the_request_is_what_the_standard_asks_for(parcel: Parcel, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    service = Service(body=listed(parcel.sop_instance_uid, "00081199"))
    with serving(service) as url:
        assert send(url, parcel, parcel, user="ali", password_file=secret) == [(Said.STORED, "")] * 2
    for headers, body in service.posted:
        kind, boundary = headers["Content-Type"].split("; boundary=")
        assert kind == 'multipart/related; type="application/dicom"'
        assert headers["Accept"] == JSON
        assert headers["Authorization"] == "Basic " + base64.b64encode(b"ali:open sesame").decode()
        assert body.startswith(f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode())
        assert body.endswith(f"\r\n--{boundary}--\r\n".encode())
        assert (
            body.split(b"\r\n\r\n", 1)[1].removesuffix(f"\r\n--{boundary}--\r\n".encode()) == parcel.path.read_bytes()
        )


@pytest.mark.parametrize(
    ("code", "tag", "reason", "said", "words"),
    [
        (200, "00081199", None, Said.STORED, ""),
        # stored with a warning
        (202, "00081199", None, Said.STORED, ""),
        (409, "00081198", 0x0122, Said.NEVER, "objects of this class"),
        (409, "00081198", 0x0111, Said.STORED, ""),
        (409, "00081198", 0xA900, Said.LATER, "0xA900: it does not match its class"),
        (202, "00081198", 0xC123, Said.LATER, "0xC123: it cannot be understood"),
        (200, "00081198", 0x0110, Said.LATER, "0x0110"),
    ],
)
def test_what_is_listed_counts(parcel: Parcel, code: int, tag: str, reason: int | None, said: Said, words: str) -> None:
    extra = {} if reason is None else {"t00081197": reason}
    with serving(Service(code, listed(parcel.sop_instance_uid, tag, **extra))) as url:
        ((found, why),) = send(url, parcel)
    assert found is said
    assert words in why


@pytest.mark.parametrize("body", [b"", b"<xml/>", b"[]", b'{"00081199": {"vr": "SQ"}}', b"[" * 100_000])
def test_a_code_alone_is_no_proof_but_the_object_there_is(parcel: Parcel, body: bytes) -> None:
    """Orthanc 1.10 answers 200, and lists nothing, where it has left a part out."""
    service = Service(200, body)
    with serving(service) as url:
        ((said, why),) = send(url, parcel)
        assert said is Said.LATER
        assert "without a word on the object" in why
        service.has.append(parcel.sop_instance_uid)
        assert send(url, parcel) == [(Said.STORED, "")]


def test_what_it_has_already_is_stored_whatever_it_says(parcel: Parcel) -> None:
    failed = listed(parcel.sop_instance_uid, "00081198", t00081197=0x0110)
    with serving(Service(409, failed, has=[parcel.sop_instance_uid])) as url:
        assert send(url, parcel) == [(Said.STORED, "")]


@pytest.mark.parametrize(
    ("code", "words", "is_of_the_object"),
    [
        (401, "check `user` and `password_file`", False),
        (403, "give it the right", False),
        (404, "check `url`", False),
        (302, "it is elsewhere", False),
        (503, "busy or broken", True),
        (500, "busy or broken", True),
    ],
)
def test_codes_of_a_service_that_takes_nothing(parcel: Parcel, code: int, words: str, is_of_the_object: bool) -> None:
    with serving(Service(code, b"Doe^Jane")) as url, pytest.raises(DestinationDownError) as raised:
        send(url, parcel)
    assert words in str(raised.value)
    assert f"HTTP {code}" in str(raised.value)
    assert "Doe" not in str(raised.value)
    assert (raised.value.during is parcel) == is_of_the_object


def test_out_of_resources_is_of_the_service(parcel: Parcel) -> None:
    full = listed(parcel.sop_instance_uid, "00081198", t00081197=0xA700)
    with serving(Service(409, full)) as url, pytest.raises(DestinationDownError, match="out of resources"):
        send(url, parcel)


@pytest.mark.parametrize("code", [400, 413, 415])
def test_an_object_that_is_refused_is_tried_later(parcel: Parcel, code: int) -> None:
    with serving(Service(code)) as url:
        ((said, why),) = send(url, parcel)
    assert said is Said.LATER
    assert f"HTTP {code}" in why


def test_a_connection_that_breaks_and_one_that_never_stands(parcel: Parcel) -> None:
    with (
        serving(Service(hangs=True)) as url,
        pytest.raises(DestinationDownError, match="broke in the middle") as raised,
    ):
        send(url, parcel)
    assert raised.value.during is parcel
    with pytest.raises(DestinationDownError, match="nothing answers") as raised:
        send(f"http://{HOST}:{free_port()}", parcel)
    assert raised.value.during is None


@pytest.mark.parametrize("url", ["no url", "ftp://host/x", "http://[::1/x"])
def test_a_wrong_url_says_so(parcel: Parcel, url: str) -> None:
    with pytest.raises(DestinationDownError, match="url"):
        send(url, parcel)


def test_tls_by_an_authority_of_ones_own(parcel: Parcel, tmp_path: Path) -> None:
    made = certificates(tmp_path)
    tls = server_context(TlsSettings(certificate=made["certificate"], key=made["key"]))
    with serving(Service(body=listed(parcel.sop_instance_uid, "00081199")), tls) as url:
        assert send(url, parcel, authority=made["authority"]) == [(Said.STORED, "")]
        with pytest.raises(DestinationDownError, match="certificate is not trusted"):
            send(url, parcel)
        with pytest.raises(DestinationDownError, match="`authority` cannot be read"):
            send(url, parcel, authority=tmp_path / "none.pem")


def test_what_is_no_dicom_file_is_never_sent(parcel: Parcel, tmp_path: Path) -> None:
    service = Service()
    with serving(service) as url:
        ((said, _),) = send(url, Parcel(parcel.delivery, tmp_path / "x.nii.gz", ""))
    assert said is Said.NEVER
    assert service.posted == []
