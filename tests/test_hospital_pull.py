"""Series fetched from a real PACS, by C-MOVE and by DICOMweb, and what it says of how many there are."""

from __future__ import annotations

import gzip
import re
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hospital_node import (
    SENDER,
    check_kept,
    closing_series,
    complete,
    counter,
    gateway,
    header,
    leaks,
    node_settings,
    rows_of,
    send,
    series_uid,
    slices,
    the_series,
)
from hospital_peers import HOST, OrthancPeer, free_port, wait_for
from pydicom import dcmread
from pynetdicom import AE, evt

from medseg_pipelines.hospital import completeness as completeness_module
from medseg_pipelines.hospital import pull as pull_module
from medseg_pipelines.hospital.completeness import NoAnswerError
from medseg_pipelines.hospital.database import refusals
from medseg_pipelines.hospital.dicomweb import ServiceError, connected, fetch_series, find_series
from medseg_pipelines.hospital.dimse import PeerUnreachable, associated
from medseg_pipelines.hospital.multipart import PartsError, each_part
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.pull import Puller, count_of
from medseg_pipelines.hospital.settings import DicomwebSettings, NodeSettings
from medseg_pipelines.hospital.store import Store

# the files here are of 2024
DAYS = 36500
MOST_BYTES = 10**8


def pulling(tmp_path: Path, orthanc: OrthancPeer, way: str, **changes: Any) -> NodeSettings:
    """A node that fetches the CT of a PACS `way`: `peer` or `dicomweb`."""
    peer = {"ae_title": orthanc.ae_title, "host": HOST, "port": orthanc.dicom_port}
    base: dict[str, Any] = {
        "peers": {"pacs": peer},
        "dicomweb": {"pacs": {"url": orthanc.dicomweb_url}},
        "gateway": {"allow": [{"ae_title": SENDER}, {"ae_title": orthanc.ae_title}]},
        "pull": [{way: "pacs", "days": DAYS, "every_s": 0.2}],
    }
    settings = node_settings(tmp_path, **base | changes)
    orthanc.know("MEDSEG", settings.gateway.port)
    return settings


def away(node: Node) -> Node:
    """The same node, whose PACS is not there."""
    peer = node.settings.peers["pacs"].model_copy(update={"port": free_port()})
    service_ = DicomwebSettings(url=f"http://{HOST}:{free_port()}")
    changes = {"peers": {"pacs": peer}, "dicomweb": {"pacs": service_}}
    return replace(node, settings=node.settings.model_copy(update=changes))


def fill(orthanc: OrthancPeer, files: list[Path]) -> None:
    orthanc.clear()
    for file in files:
        orthanc.add(file)


@pytest.mark.parametrize("way", ["peer", "dicomweb"])
def test_a_series_of_the_pacs_is_fetched_once(
    tmp_path: Path, orthanc: OrthancPeer, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = slices(tmp_path / "ct")
    fill(orthanc, files)
    settings = pulling(tmp_path, orthanc, way, completeness={"quiet_s": 0.2, f"ask_{way}": "pacs"})
    with gateway(settings) as node:
        row = complete(node, images=5)
        assert (row.expected, row.assumed) == (5, False)
        assert row.sent_by == ("ORTHANC" if way == "peer" else "pacs")
        sent = {dcmread(file).SOPInstanceUID: dcmread(file) for file in files}
        for kept in check_kept(node):
            found, was = dcmread(node.store.folder / kept.file), sent[kept.sop_instance_uid]
            assert found.PixelData == was.PixelData
            assert found.PatientName == was.PatientName
        puller = Puller(settings.pull[0], node, most_bytes=MOST_BYTES)
        assert puller.look() == 0
        assert counter(node, "received_again") == 0
        # a slice that comes later to the PACS is fetched by the gateway, and makes a revision
        orthanc.add(slices(tmp_path / "late", 1, first=5)[0])
        complete(node, revision=2, images=6)
        assert puller.look() == 0
        assert caplog.text.count("is fetched (6 instances)") == 1
    assert leaks(tmp_path / "node", caplog.text) == []
    assert series_uid(1) not in caplog.text


@pytest.mark.parametrize("way", ["peer", "dicomweb"])
def test_what_does_not_match_is_left_there(tmp_path: Path, orthanc: OrthancPeer, way: str) -> None:
    other = header(2)
    other.Modality = "MR"
    other.save_as(tmp_path / "mr.dcm", enforce_file_format=True)
    fill(orthanc, [*slices(tmp_path / "ct", 1), tmp_path / "mr.dcm"])
    node = open_node(pulling(tmp_path, orthanc, way), "gateway")
    for changes in ({"series_description": "^Thorax"}, {"days": 1}):
        settings = node.settings.pull[0].model_copy(update=changes)
        assert Puller(settings, node, most_bytes=MOST_BYTES).look() == 0
    puller = Puller(node.settings.pull[0], node, most_bytes=MOST_BYTES)
    wanted: list[str] = []
    puller._note = lambda one: wanted.append(one.series_uid)  # type: ignore[method-assign]
    puller.look()
    assert wanted == [series_uid(1)]
    node.close()


@pytest.mark.parametrize("way", ["peer", "dicomweb"])
def test_a_pacs_that_is_down_is_told_once_and_asked_again(
    tmp_path: Path, orthanc: OrthancPeer, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fill(orthanc, slices(tmp_path / "ct", 1))
    node = open_node(pulling(tmp_path, orthanc, way), "gateway")
    puller = Puller(node.settings.pull[0], away(node), most_bytes=MOST_BYTES)
    assert [puller.look() for _ in range(3)] == [0, 0, 0]
    puller._node = node
    assert caplog.text.count("it is asked again") == 1
    assert puller.look() == 1
    assert "answers again" in caplog.text
    node.close()


def test_a_series_of_which_fewer_come_is_fetched_later_and_later(
    tmp_path: Path, orthanc: OrthancPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(orthanc, slices(tmp_path / "ct", 2))
    clock = {"s": 1000.0}
    monkeypatch.setattr(pull_module.time, "monotonic", lambda: clock["s"])
    node = open_node(pulling(tmp_path, orthanc, "dicomweb"), "gateway")
    puller = Puller(node.settings.pull[0], node, most_bytes=MOST_BYTES)
    with monkeypatch.context() as broken:
        broken.setattr(node.intake, "take", lambda path, sent_by: None)
        fetched = []
        for _ in range(8):
            fetched.append(puller.look())
            clock["s"] += 50
    # at 0 s, after 60 s and after 120 s more
    assert fetched == [1, 0, 1, 0, 0, 1, 0, 0]
    clock["s"] += 10_000
    assert puller.look() == 1
    assert the_series(node).images == 2
    node.close()


def test_a_disk_at_its_watermark_fetches_nothing(
    tmp_path: Path, orthanc: OrthancPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(orthanc, slices(tmp_path / "ct", 2))
    node = open_node(pulling(tmp_path, orthanc, "dicomweb"), "gateway")
    monkeypatch.setattr(Store, "has_room", lambda self, size=0: False)
    assert Puller(node.settings.pull[0], node, most_bytes=MOST_BYTES).look() == 0
    assert "nothing is fetched" in caplog.text
    assert check_kept(node) == []
    node.close()


def test_a_move_to_a_node_that_the_pacs_does_not_know_is_told(
    tmp_path: Path, orthanc: OrthancPeer, caplog: pytest.LogCaptureFixture
) -> None:
    fill(orthanc, slices(tmp_path / "ct", 1))
    settings = pulling(tmp_path, orthanc, "peer", gateway={"ae_title": "NOBODY"})
    node = open_node(settings, "gateway")
    Puller(settings.pull[0], node, most_bytes=MOST_BYTES).look()
    assert "check that it knows NOBODY" in caplog.text
    node.close()


# ---- counts


@pytest.mark.parametrize("way", ["ask_peer", "ask_dicomweb"])
def test_a_count_is_that_of_the_pacs(
    tmp_path: Path, orthanc: OrthancPeer, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(orthanc, [*slices(tmp_path / "a", 3), *slices(tmp_path / "b", 2, number=2)])
    settings = pulling(tmp_path, orthanc, "peer", completeness={way: "pacs"})
    ask = count_of(settings)
    assert ask is not None
    study = "1.2.826.0.1.3680043.8.498.7.0"
    assert [ask(study, series_uid(number)) for number in (1, 2, 3)] == [3, 2, None]
    node = open_node(settings, "gateway")
    gone = count_of(away(node).settings)
    node.close()
    assert gone is not None
    for _ in range(2):
        with pytest.raises(NoAnswerError):
            gone(study, series_uid(1))
    assert caplog.text.count("series wait for it") == 1
    assert count_of(node_settings(tmp_path)) is None


def test_a_series_waits_for_what_the_pacs_has_more(
    tmp_path: Path, orthanc: OrthancPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completeness_module, "ASK_S", 0.1)
    files = slices(tmp_path / "ct", 4)
    fill(orthanc, files)
    settings = pulling(tmp_path, orthanc, "peer", pull=[], completeness={"quiet_s": 0.1, "ask_peer": "pacs"})
    with gateway(settings) as node:
        assert send(settings.gateway.port, files[:3]) == [0] * 3
        with closing_series(node):
            wait_for(lambda: the_series(node).expected == 4)
        assert the_series(node).state == "receiving"
        assert send(settings.gateway.port, files[3:]) == [0]
        assert not complete(node, images=4).assumed


# ---- peers that are not as they should be


@contextmanager
def fake_peer(find: Any) -> Iterator[NodeSettings]:
    """A PACS that answers C-FIND and C-MOVE by `find`, which is given the event."""
    port = free_port()
    ae = AE("PACS")
    for model in (pull_module.FIND, pull_module.MOVE):
        ae.add_supported_context(model)
    handlers = [(evt.EVT_C_FIND, find), (evt.EVT_C_MOVE, find)]
    server = ae.start_server((HOST, port), block=False, evt_handlers=handlers)
    peer = {"pacs": {"ae_title": "PACS", "host": HOST, "port": port}}
    yield NodeSettings.model_validate(
        {"folder": "/nowhere", "peers": peer, "completeness": {"ask_peer": "pacs"}, "pull": [{"peer": "pacs"}]}
    )
    server.shutdown()
    ae.shutdown()


def fails(event: Any) -> Iterator[Any]:
    yield 0xA700, None


def breaks_off(event: Any) -> Iterator[Any]:
    event.assoc.abort()
    yield 0x0000, None


def finds_too_much(event: Any) -> Iterator[Any]:
    for _ in range(5):
        yield 0xFF00, event.identifier


@pytest.mark.parametrize(
    ("find", "words"),
    [(fails, "status 0xA700"), (breaks_off, "C-FIND fails|broke"), (finds_too_much, "more than 3 answers")],
)
def test_a_peer_that_does_not_answer_as_it_should_is_no_count(
    find: Any, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pull_module, "MOST_FOUND", 3)
    with fake_peer(find) as settings:
        ask = count_of(settings)
        assert ask is not None
        with pytest.raises(NoAnswerError):
            ask("1.2.3", "1.2.4")
    assert re.search(words, caplog.text)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_answers_for_other_series_are_no_count() -> None:
    def find(event: Any) -> Iterator[Any]:
        found = event.identifier
        for uid in ("../x", "1.2.5"):
            found.SeriesInstanceUID, found.NumberOfSeriesRelatedInstances = uid, 7
            yield 0xFF00, found

    with fake_peer(find) as settings:
        ask = count_of(settings)
        assert ask is not None
        assert ask("1.2.3", "1.2.4") is None


@pytest.mark.parametrize("what", ["PDU", "answer"])
def test_an_answer_without_end_is_not_held_in_memory(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "FIND_S", 2.0)

    def find(event: Any) -> Iterator[Any]:
        wire = event.assoc.dul.socket.socket
        # a PDU of 4 GB, or parts of a command of which none is the last one
        part = struct.pack(">BBLLBB", 4, 0, 100_006, 100_002, 1, 1) + bytes(100_000)
        with suppress(OSError):
            wire.sendall(b"\4\0\xff\xff\xff\xf0" if what == "PDU" else part)
            for _ in range(600):
                wire.sendall(bytes(100_000) if what == "PDU" else part)
        yield 0x0000, None

    tracemalloc.start()
    with fake_peer(find) as settings:
        ask = count_of(settings)
        assert ask is not None
        with pytest.raises(NoAnswerError):
            ask("1.2.3", "1.2.4")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**25


@pytest.mark.parametrize("value", [b"FD\6\0abcdef", b"US\3\0abc"], ids=["FD", "US"])
def test_a_value_that_cannot_be_read_is_no_count_and_ends_nothing(
    value: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heads = (
        b"\x08\0\x52\0CS\6\0SERIES\x08\0\x60\0CS\2\0CT",
        b"\x20\0\x0d\0UI\6\0001.2.3\0\x20\0\x0e\0UI\6\0001.2.4\0",
        b"\x20\0\x09\x12" + value,
    )
    monkeypatch.setattr(pull_module, "SYNTAXES", ["1.2.840.10008.1.2.1"])
    monkeypatch.setattr("pynetdicom.service_class.encode", lambda *_: b"".join(heads))

    def find(event: Any) -> Iterator[Any]:
        yield 0xFF00, event.identifier

    with fake_peer(find) as settings:
        ask = count_of(settings)
        assert ask is not None
        with pytest.raises(NoAnswerError):
            ask("1.2.3", "1.2.4")
    assert "cannot be read" in caplog.text
    assert "abc" not in caplog.text


def test_a_series_whose_modality_is_not_told_is_counted() -> None:
    def find(event: Any) -> Iterator[Any]:
        found = event.identifier
        del found.Modality
        found.NumberOfSeriesRelatedInstances = 7
        yield 0xFF00, found

    with fake_peer(find) as settings:
        ask = count_of(settings)
        assert ask is not None
        assert ask("1.2.3", "1.2.4") == 7


def test_a_move_without_an_answer_is_told() -> None:
    peer_of = "pacs"
    with fake_peer(breaks_off) as settings:
        peer = settings.peers[peer_of]
        found = pull_module.Found("1.2.3", "1.2.4", "", None)
        with (
            pytest.raises(PeerUnreachable, match=r"no answer to C-MOVE|broke"),
            associated(
                peer, ae_title="MEDSEG", contexts=[(pull_module.MOVE, pull_module.SYNTAXES)], timeout_s=10
            ) as made,
        ):
            pull_module._move(made, found, "MEDSEG", peer)


# ---- services that are not as they should be


@contextmanager
def service(
    status: int, body: bytes, content_type: str = "application/dicom+json", **headers: str
) -> Iterator[DicomwebSettings]:
    """Answers every GET alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer((HOST, free_port()), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield DicomwebSettings(url=f"http://{HOST}:{server.server_port}/")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [(401, b"", "password_file"), (404, b"", "`url`"), (302, b"", "HTTP 302"), (200, b"<html>", "no JSON")],
)
def test_a_service_that_does_not_answer_as_it_should_is_told(status: int, body: bytes, words: str) -> None:
    with service(status, body) as asked, connected(asked) as client, pytest.raises(ServiceError, match=words):
        list(find_series(client, asked, {}))


@pytest.mark.parametrize("body", [b"", b"{}", b'[1, {"0020000E": 3}, {"0020000E": {"Value": ["../x"]}}]'])
def test_an_answer_without_series_is_none(body: bytes) -> None:
    with service(200, body) as asked, connected(asked) as client:
        found = [pull_module._from_json(item) for item in find_series(client, asked, {})]
    assert not any(found)


def test_a_list_without_end_is_not_read_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg_pipelines.hospital import dicomweb

    monkeypatch.setattr(dicomweb, "MOST_ANSWER", 1000)
    with (
        service(200, bytes(100_000)) as asked,
        connected(asked) as client,
        pytest.raises(ServiceError, match="more than 1000 bytes"),
    ):
        list(find_series(client, asked, {}))


def test_what_unfolds_to_gigabytes_is_not_unfolded() -> None:
    # 64 MiB by a kilobyte; each layer more is a thousand times as much
    bomb = gzip.compress(gzip.compress(bytes(2**26)))
    assert len(bomb) < 1000
    tracemalloc.start()
    with (
        service(200, bomb, Content_Encoding="gzip, gzip") as asked,
        connected(asked) as client,
        pytest.raises(ServiceError, match="compressed"),
    ):
        list(find_series(client, asked, {}))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**24


def test_a_series_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg_pipelines.hospital.dicomweb.MOST_FILES", 3)
    store = Store(tmp_path / "store", least_free_gb=0)
    body = b"\r\n--x\r\n\r\nmuch" * 10 + b"\r\n--x--"
    kind = 'multipart/related; type="application/dicom"; boundary=x'
    with service(200, body, kind) as asked, connected(asked) as client:
        files = fetch_series(client, asked, "1.2", "1.3", store.new_file, most_bytes=MOST_BYTES)
        assert len([next(files) for _ in range(3)]) == 3
        with pytest.raises(ServiceError, match="more than 3 files"):
            next(files)


def test_the_disk_is_asked_for_room_before_each_file(
    tmp_path: Path, orthanc: OrthancPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(orthanc, slices(tmp_path / "ct", 4))
    node = open_node(pulling(tmp_path, orthanc, "dicomweb"), "gateway")
    # for one file alone
    monkeypatch.setattr(node.store, "has_room", lambda size=0: not list((node.store.folder / "store").rglob("*.dcm")))
    assert Puller(node.settings.pull[0], node, most_bytes=MOST_BYTES).look() == 0
    assert len(check_kept(node)) == 1
    node.close()


def test_a_series_that_is_cut_off_keeps_what_came_whole(tmp_path: Path) -> None:
    first, second = (file.read_bytes() for file in slices(tmp_path / "ct", 2))
    head = b"\r\n--x\r\nContent-Type: application/dicom\r\n\r\n"
    body = head + first + head + second[:-10]
    store = Store(tmp_path / "store", least_free_gb=0)
    got = []

    def fetch() -> None:
        content_type = 'multipart/related; type="application/dicom"; boundary=x'
        with service(200, body, content_type) as asked, connected(asked) as client:
            for path in fetch_series(client, asked, "1.2", "1.3", store.new_file, most_bytes=MOST_BYTES):
                got.append(path.read_bytes())

    with pytest.raises(ServiceError, match="cut off"):
        fetch()
    assert got == [first]
    assert list(store.incoming.iterdir()) == []


# ---- parts


def parts_of(
    body: bytes, block: int, store: Store, *, most_bytes: int = 1000, boundary: str = 'boundary="a b"'
) -> list[bytes]:
    blocks = (body[at : at + block] for at in range(0, len(body), block))
    content_type = f'multipart/related; type="application/dicom"; {boundary}'
    return [path.read_bytes() for path in each_part(blocks, content_type, store.new_file, most_bytes=most_bytes)]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("start", [b"", b"\r\n", b"a preamble\r\n"])
def test_parts_are_what_stands_between_the_marks(tmp_path: Path, block: int, start: bytes) -> None:
    store = Store(tmp_path, least_free_gb=0)
    contents = [b"one", b"\r\n--a", b"", b"\r\n\r\n--a c\r\n-"]
    heads = [b"A: b\r\n", b"", b"Content-Type: application/dicom\r\nB: c\r\n", b"A: b\r\n"]
    body = (
        start + b"".join(b"--a b\r\n%b\r\n%b\r\n" % pair for pair in zip(heads, contents, strict=True)) + b"--a b--\r\n"
    )
    assert parts_of(body, block, store) == contents


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"--a b\r\n\r\nhalf", "cut off"),
        (b"", "cut off"),
        (b"--a b\r\n\r\n" + bytes(2000) + b"\r\n--a b--", "more than 1000 bytes"),
        (b"--a b\r\n" + b"h" * 40_000 + b"\r\n\r\n\r\n--a b--", "lines before it"),
    ],
)
def test_parts_that_are_none_are_refused(tmp_path: Path, body: bytes, words: str) -> None:
    store = Store(tmp_path, least_free_gb=0)
    with pytest.raises(PartsError, match=words):
        parts_of(body, 100, store)
    assert list(store.incoming.iterdir()) == []


def test_an_answer_of_one_part_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, least_free_gb=0)
    with pytest.raises(PartsError, match="not of several parts"):
        parts_of(b"", 1, store, boundary="")


def test_a_refused_file_of_a_pull_is_written_down(
    tmp_path: Path, orthanc: OrthancPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(orthanc, slices(tmp_path / "ct", 2))
    node = open_node(pulling(tmp_path, orthanc, "dicomweb"), "gateway")
    spoilt: list[Path] = []
    take = node.intake.take

    def spoil(path: Path, *, sent_by: str) -> object:
        if not spoilt:
            spoilt.append(path)
            path.write_bytes(b"no DICOM")
        return take(path, sent_by=sent_by)

    monkeypatch.setattr(node.intake, "take", spoil)
    assert Puller(node.settings.pull[0], node, most_bytes=MOST_BYTES).look() == 1
    assert len(check_kept(node)) == 1
    assert len(rows_of(node, refusals)) == 1
    node.close()
