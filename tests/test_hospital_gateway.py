"""DICOM in by C-STORE: what is answered, kept, refused, and survived."""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hospital_node import (
    EXPLICIT,
    association,
    check_kept,
    complete,
    counter,
    gateway,
    gateway_process,
    header,
    jobs_of,
    leaks,
    node_settings,
    rejection_of,
    rows_of,
    send,
    settings_dict,
    slices,
)
from hospital_peers import HOST, required, wait_for
from pydicom import dcmread
from pynetdicom.dimse_messages import C_STORE_RQ

import medseg
from medseg_pipelines.hospital import gateway as gateway_module
from medseg_pipelines.hospital import scp
from medseg_pipelines.hospital.database import instances, refusals
from medseg_pipelines.hospital.node import Node, open_node
from medseg_pipelines.hospital.settings import NodeSettings
from medseg_pipelines.hospital.store import Store

NO_ROOM, NOT_UNDERSTOOD = 0xA700, 0xC000


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    return node_settings(tmp_path)


def echo(port: int, **options: object) -> bool:
    with association(port, **options) as made:  # type: ignore[arg-type]
        return bool(made.is_established) and made.send_c_echo().get("Status") == 0


def incoming(node: Node) -> list[Path]:
    return list(node.store.incoming.iterdir())


# ---- what is kept


def test_a_series_becomes_one_revision_and_one_job_however_often_it_comes(
    tmp_path: Path, settings: NodeSettings
) -> None:
    files = slices(tmp_path / "ct")
    with gateway(settings) as node:
        assert send(settings.gateway.port, files) == [0] * 5
        row = complete(node, images=5)
        assert (row.sent_by, row.assumed, row.patient_name) == ("SCANNER", True, "Tweety^Bird")
        assert send(settings.gateway.port, files[::-1]) == [0] * 5
        assert send(settings.gateway.port, files) == [0] * 5
        assert len(check_kept(node)) == 5
        assert counter(node, "received") == 5
        assert counter(node, "received_again") == 10
        assert len(jobs_of(node)) == 1
        assert complete(node).revision == 1
        assert incoming(node) == []


def test_a_file_is_kept_with_the_bytes_that_were_sent(tmp_path: Path, settings: NodeSettings) -> None:
    (sent,) = slices(tmp_path / "ct", 1)
    with gateway(settings) as node:
        assert send(settings.gateway.port, [sent]) == [0]
        (row,) = check_kept(node)
        assert dcmread(node.store.folder / row.file) == dcmread(sent)
        assert row.transfer_syntax_uid == EXPLICIT


def test_series_that_come_shuffled_and_interleaved_are_two(tmp_path: Path, settings: NodeSettings) -> None:
    files = slices(tmp_path / "a", number=1) + slices(tmp_path / "b", number=2)
    random.Random(0).shuffle(files)
    answers: list[int | None] = []
    with gateway(settings) as node:
        senders = [
            threading.Thread(target=lambda part=part: answers.extend(send(settings.gateway.port, part)))
            for part in (files[::2], files[1::2])
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        assert answers == [0] * 10
        assert [complete(node, number).images for number in (1, 2)] == [5, 5]
        assert [len(jobs_of(node, number)) for number in (1, 2)] == [1, 1]


def test_a_late_slice_makes_a_second_revision_with_a_job_of_its_own(tmp_path: Path, settings: NodeSettings) -> None:
    with gateway(settings) as node:
        send(settings.gateway.port, slices(tmp_path / "ct", 4))
        complete(node, images=4)
        assert send(settings.gateway.port, slices(tmp_path / "late", 1, first=4)) == [0]
        complete(node, revision=2, images=5)
        first, second = jobs_of(node)
        assert (first.revision, second.revision) == (1, 2)
        assert first.id != second.id
        assert sorted(row.revision for row in rows_of(node, instances)) == [1, 1, 1, 1, 2]


def test_dcmtk_sends_what_it_has(tmp_path: Path, settings: NodeSettings) -> None:
    storescu = required("storescu", "dcmtk")
    slices(tmp_path / "ct")
    command = [storescu, "-aet", "SCANNER", "-aec", "MEDSEG", "+sd", HOST, str(settings.gateway.port)]
    with gateway(settings) as node:
        subprocess.run([*command, str(tmp_path / "ct")], check=True)
        complete(node, images=5)
        assert echo(settings.gateway.port)


# ---- what is not taken


def test_an_instance_with_another_content_is_a_copy_and_no_new_revision(tmp_path: Path, settings: NodeSettings) -> None:
    files = slices(tmp_path / "ct")
    with gateway(settings) as node:
        send(settings.gateway.port, files)
        complete(node)
        other = header(1, 0)
        other.WindowCenter = 40
        assert send(settings.gateway.port, [other]) == [0]
        assert [row.is_copy for row in check_kept(node)].count(True) == 1
        assert complete(node).images == 5
        assert len(jobs_of(node)) == 1


def test_a_disk_at_its_watermark_is_told_and_recovers_by_itself(
    tmp_path: Path, settings: NodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = slices(tmp_path / "ct")
    free = {"bytes": 10**12}
    monkeypatch.setattr(Store, "free_bytes", property(lambda self: free["bytes"]))
    with gateway(node_settings(tmp_path, storage={"least_free_gb": 1.0})) as node:
        port = node.settings.gateway.port
        assert send(port, files[:2]) == [0, 0]
        free["bytes"] = 10**8
        assert send(port, files) == [NO_ROOM] * 5
        assert len(check_kept(node)) == 2
        assert counter(node, "refused_no_room") == 5
        assert incoming(node) == []
        free["bytes"] = 10**12
        assert send(port, files) == [0] * 5
        complete(node, images=5)


def test_a_file_for_which_the_room_ends_on_the_way_is_not_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scp, "ROOM_EVERY", 1)
    asked: list[int] = []
    biggest: list[int] = []

    def has_room(store: Store, size: int = 0) -> bool:
        asked.append(size)
        biggest.extend(path.stat().st_size for path in store.incoming.iterdir())
        return len(asked) < 3

    (file,) = slices(tmp_path / "ct", 1, rows=1024)
    monkeypatch.setattr(Store, "has_room", has_room)
    with gateway(node_settings(tmp_path)) as node:
        assert send(node.settings.gateway.port, [file]) == [NO_ROOM]
        assert max(biggest) < file.stat().st_size / 2
        assert incoming(node) == check_kept(node) == []


def test_a_failing_database_is_never_success(
    tmp_path: Path, settings: NodeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    files = slices(tmp_path / "ct", 2)
    with gateway(settings) as node:
        with node.database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE instances RENAME TO away")
        assert send(settings.gateway.port, files) == [NO_ROOM] * 2
        with node.database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE away RENAME TO instances")
        assert send(settings.gateway.port, files) == [0, 0]
        complete(node, images=2)
    assert leaks(tmp_path / "node", caplog.text) == []


def test_a_file_that_is_too_large_ends_the_association(tmp_path: Path) -> None:
    (large,) = slices(tmp_path / "large", 1, rows=512)
    (small,) = slices(tmp_path / "small", 1)
    with gateway(node_settings(tmp_path, gateway={"most_mb": 0.2})) as node:
        port = node.settings.gateway.port
        assert send(port, [large]) == [None]
        assert send(port, [small]) == [0]
        (row,) = wait_for(lambda: rows_of(node, refusals))
        assert row.reason == "a message of more than 200000 bytes"
        wait_for(lambda: not incoming(node))


def test_messages_before_an_answer_are_bounded(tmp_path: Path, settings: NodeSettings) -> None:
    started, go_on = threading.Event(), threading.Event()
    files = slices(tmp_path / "ct", 5)
    with gateway(settings) as node, association(settings.gateway.port) as made:
        take = node.intake.take

        def slow(path: Path, *, sent_by: str) -> object:
            started.set()
            go_on.wait(20)
            return take(path, sent_by=sent_by)

        object.__setattr__(node.intake, "take", slow)
        senders = [threading.Thread(target=lambda f=f: made.send_c_store(f), daemon=True) for f in files[:1]]
        senders[0].start()
        assert started.wait(20)
        # without waiting for an answer, as no peer should
        for message_id, file in enumerate(files[1:], 2):
            made.dimse.send_msg(_request(file, message_id), 1)
        wait_for(lambda: not made.is_established)
        go_on.set()
        (row,) = wait_for(lambda: rows_of(node, refusals))
        assert row.reason == "too many messages before an answer"
        wait_for(lambda: not incoming(node))
        assert echo(settings.gateway.port)


Part = tuple[int, bytes]


def _parts(file: Path) -> list[Part]:
    """The command of a C-STORE and its data set: context, control header and content of each."""
    message = C_STORE_RQ()
    message.primitive_to_message(_request(file, 1))  # type: ignore[arg-type]
    return [part for data in message.encode_msg(1, 2**20) for part in data.presentation_data_value_list]


def _pdu(parts: list[Part]) -> bytes:
    """One P-DATA-TF with all of them (PS3.8 9.3.5)."""
    items = b"".join(struct.pack(">LB", len(data) + 1, context) + data for context, data in parts)
    return struct.pack(">BBL", 4, 0, len(items)) + items


def test_a_command_may_come_together_with_its_data(tmp_path: Path, settings: NodeSettings) -> None:
    # longer than a message that is no file may be
    (file,) = slices(tmp_path / "ct", 1, rows=220)
    with gateway(settings) as node, association(settings.gateway.port) as made:
        packed = _pdu(_parts(file))
        assert scp.MOST_SMALL < len(packed) < scp.MAXIMUM_PDU
        made.dul.socket.socket.sendall(packed)  # type: ignore[union-attr]
        wait_for(lambda: counter(node, "received") == 1)
        (kept,) = check_kept(node)
        assert dcmread(node.store.folder / kept.file) == dcmread(file)
        assert made.is_established


@pytest.mark.parametrize("at_once", [True, False])
def test_a_message_has_one_command(tmp_path: Path, settings: NodeSettings, at_once: bool) -> None:
    # each more would be held in memory, up to the size of a file
    command, data = _parts(slices(tmp_path / "ct", 1)[0])
    with gateway(settings) as node, association(settings.gateway.port) as made:
        pdus = [_pdu([command, command, data])] if at_once else [_pdu([command]), _pdu([(1, b"\1" + bytes(1000))])]
        for pdu in pdus:
            made.dul.socket.socket.sendall(pdu)  # type: ignore[union-attr]
        wait_for(lambda: not made.is_established)
        wait_for(lambda: [row.reason for row in rows_of(node, refusals)] == ["a second command in a message"])
        wait_for(lambda: not incoming(node))
        assert echo(settings.gateway.port)


def test_a_gateway_that_is_stopped_waits_for_nobody(tmp_path: Path) -> None:
    values = settings_dict(tmp_path)
    with gateway_process(tmp_path, values) as process, association(values["gateway"]["port"]) as made:
        assert made.is_established
        # a file of which half has come
        wire = made.dul.socket.socket  # type: ignore[union-attr]
        command = _request(slices(tmp_path / "ct", 1)[0], 1)
        made.dimse.send_msg(command, 1)
        wire.sendall(b"\x04\x00\x00\x00\x10\x00")  # type: ignore[union-attr]
        process.terminate()
        assert process.wait(20) == 0
    assert list((tmp_path / "node" / "incoming").iterdir()) == []
    assert '"ended"' in next((tmp_path / "node" / "audit").iterdir()).read_text()


def test_a_probe_of_the_port_is_no_refusal(settings: NodeSettings, caplog: pytest.LogCaptureFixture) -> None:
    with gateway(settings) as node:
        for _ in range(3):
            socket.create_connection((HOST, settings.gateway.port)).close()
        assert echo(settings.gateway.port)
        assert counter(node, "associations_refused") == 0
    assert "refused" not in caplog.text


def _request(file: Path, message_id: int) -> object:
    from io import BytesIO

    from pynetdicom.dimse_primitives import C_STORE
    from pynetdicom.dsutils import encode

    sent = dcmread(file)
    request = C_STORE()
    request.MessageID, request.Priority = message_id, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sent.SOPClassUID, sent.SOPInstanceUID
    request.DataSet = BytesIO(encode(sent, False, True) or b"")
    return request


# ---- who is let in


@pytest.mark.parametrize(("called", "calling"), [("OTHER", "SCANNER"), ("MEDSEG", "STRANGER")])
def test_a_wrong_title_is_rejected(settings: NodeSettings, called: str, calling: str) -> None:
    which = "Called" if called == "OTHER" else "Calling"
    with gateway(settings) as node:
        reason = rejection_of(settings.gateway.port, called=called, calling=calling)
        assert reason == f"{which} AE title not recognised"
        wait_for(lambda: counter(node, "associations_refused") >= 1)
        assert echo(settings.gateway.port)


def test_a_command_of_many_items_is_not_read(settings: NodeSettings) -> None:
    # reading it would take ten seconds, and 85 MB
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0)
    command = struct.pack("<HHL", 0, 0x9999, 0xFFFFFFFF) + item * 120_000 + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    with gateway(settings) as node, association(settings.gateway.port) as made:
        wire = made.dul.socket.socket  # type: ignore[union-attr]
        with suppress(OSError):
            for at in range(0, len(command), 100_000):
                part = command[at : at + 100_000]
                last = 3 if at + len(part) == len(command) else 1
                wire.sendall(struct.pack(">BBLLBB", 4, 0, len(part) + 6, len(part) + 2, 1, last) + part)  # type: ignore[union-attr]
        wait_for(lambda: not made.is_established)
        wait_for(lambda: [row.reason for row in rows_of(node, refusals)] == ["a message of more than 65536 bytes"])


@pytest.mark.parametrize("more", ["\n", "\x1c", "\x1b[2J", "\xff"])
@pytest.mark.parametrize("at", [26, 10], ids=["calling", "called"])
def test_a_title_with_something_unseen_is_none(settings: NodeSettings, tmp_path: Path, more: str, at: int) -> None:
    with socket.create_server((HOST, 0)) as server:
        asking = threading.Thread(target=send, args=(server.getsockname()[1], slices(tmp_path / "ct", 1)))
        asking.start()
        heard, _ = server.accept()
        request = bytearray(heard.recv(65536))
        heard.close()
        asking.join()
    known = request[at : at + 16].rstrip(b" ")
    request[at : at + 16] = (known + more.encode("latin-1")).ljust(16)
    with (
        gateway(settings) as node,
        socket.create_connection((HOST, node.settings.gateway.port), 10) as made,
    ):
        made.settimeout(10)
        made.sendall(request)
        # A-ASSOCIATE-RJ
        assert made.recv(1) == b"\3"


def test_an_unknown_address_is_not_listened_to(tmp_path: Path) -> None:
    allow = [{"ae_title": "SCANNER", "network": "10.0.0.0/8"}]
    with gateway(node_settings(tmp_path, gateway={"allow": allow})) as node:
        assert rejection_of(node.settings.gateway.port) is None
        with association(node.settings.gateway.port) as made:
            assert not made.is_established


def test_an_address_counts_for_its_title_alone(tmp_path: Path) -> None:
    allow = [{"ae_title": "SCANNER", "network": "127.0.0.0/8"}, {"ae_title": "AWAY", "network": "10.0.0.0/8"}]
    with gateway(node_settings(tmp_path, gateway={"allow": allow})) as node:
        assert echo(node.settings.gateway.port)
        assert rejection_of(node.settings.gateway.port, calling="AWAY") == "Calling AE title not recognised"


def test_everybody_may_send_where_nobody_is_named_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with gateway(node_settings(tmp_path, gateway={"allow": []})) as node:
        assert echo(node.settings.gateway.port, calling="ANYBODY")
    assert "everybody who reaches that port may send" in caplog.text


def test_one_association_too_many_is_rejected_until_another_ends(tmp_path: Path) -> None:
    with gateway(node_settings(tmp_path, gateway={"most_associations": 2})) as node:
        port = node.settings.gateway.port
        with association(port) as first, association(port) as second:
            assert first.is_established
            assert second.is_established
            assert rejection_of(port) == "Local limit exceeded"
        wait_for(lambda: echo(port))


def test_all_associations_that_the_settings_allow_are_accepted(tmp_path: Path) -> None:
    with gateway(node_settings(tmp_path)) as node, ExitStack() as stack:
        most, port = node.settings.gateway.most_associations, node.settings.gateway.port
        made = [stack.enter_context(association(port)) for _ in range(most)]
        assert [one.is_established for one in made] == [True] * most
        assert rejection_of(port) == "Local limit exceeded"
        wait_for(lambda: counter(node, "associations_refused") == 1)


def test_an_idle_association_is_ended(tmp_path: Path) -> None:
    with (
        gateway(node_settings(tmp_path, gateway={"idle_s": 0.5, "most_associations": 1})) as node,
        association(node.settings.gateway.port) as made,
    ):
        wait_for(lambda: made.is_aborted)
        wait_for(lambda: echo(node.settings.gateway.port))


def test_a_port_in_use_is_told_at_the_start(tmp_path: Path, settings: NodeSettings) -> None:
    with gateway(settings):
        other = open_node(settings, "gateway", 1)
        with pytest.raises(medseg.ConfigError, match="another gateway"):
            gateway_module.run_gateway(other, threading.Event())
        other.close()


def test_a_rule_without_its_model_is_told_at_the_start(tmp_path: Path) -> None:
    rules = [{"name": "ct", "model": str(tmp_path / "nowhere")}]
    with pytest.raises(medseg.ConfigError, match="rule ct"), gateway(node_settings(tmp_path, rules=rules)):
        pass


def test_a_thread_that_fails_ends_the_gateway(settings: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> int:
        raise RuntimeError("Tweety")

    monkeypatch.setattr(gateway_module.Completeness, "look", broken)
    node = open_node(settings, "gateway")
    with pytest.raises(medseg.MedsegError, match=r"completeness has failed: RuntimeError at \S+:\d+") as told:
        gateway_module.run_gateway(node, threading.Event())
    assert "Tweety" not in str(told.value)
    node.close()


def test_the_process_ends_with_an_error_where_a_part_of_it_fails(tmp_path: Path) -> None:
    values = settings_dict(tmp_path)
    (tmp_path / "model" / "model.json").unlink()
    with gateway_process(tmp_path, values) as process:
        assert process.wait(60) != 0
    assert "rule ct" in (tmp_path / "log").read_text()


# ---- killed in the middle


def test_killed_in_a_storm_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    values = settings_dict(tmp_path, completeness={"quiet_s": 3.0})
    port = values["gateway"]["port"]
    parts = [slices(tmp_path / f"{n}", 30, number=n) for n in (1, 2)]
    acknowledged: list[Path] = []

    def storm(part: list[Path]) -> None:
        with association(port) as made:
            for file in part:
                if not made.is_established or made.send_c_store(file).get("Status") != 0:
                    return
                acknowledged.append(file)

    with gateway_process(tmp_path, values) as process:
        senders = [threading.Thread(target=storm, args=(part,)) for part in parts]
        for sender in senders:
            sender.start()
        wait_for(lambda: len(acknowledged) >= 15)
        process.kill()
        for sender in senders:
            sender.join()
    assert 15 <= len(acknowledged) < 60
    node = open_node(NodeSettings.model_validate(values), "web")
    kept = {row.sop_instance_uid: row for row in check_kept(node)}
    for file in acknowledged:
        sent = dcmread(file)
        assert dcmread(node.store.folder / kept[sent.SOPInstanceUID].file) == sent
    with gateway_process(tmp_path, values):
        assert send(port, [file for pair in zip(*parts, strict=True) for file in pair]) == [0] * 60
        assert [complete(node, number, revision=1, images=30).images for number in (1, 2)] == [30, 30]
    assert len(check_kept(node)) == 60
    node.close()
    assert leaks(tmp_path / "node", (tmp_path / "log").read_text()) == []


def test_what_a_killed_gateway_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = node_settings(tmp_path)
    node = open_node(settings, "web")
    (node.store.incoming / "tmpabc.dcm").write_bytes(b"x")
    node.close()
    monkeypatch.setattr(gateway_module, "LEFT_S", -1.0)
    with gateway(settings) as running:
        assert incoming(running) == []
