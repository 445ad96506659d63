"""Results on their way out: to a real PACS, to peers that break, refuse or lie, and to folders."""

from __future__ import annotations

import errno
import gzip
import io
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import sqlalchemy as sa
from hospital_peers import HOST, OrthancPeer, free_port, new_orthanc, wait_for
from hospital_publishing import (
    IMPLICIT,
    SENDS,
    Received,
    audit_events,
    certificates,
    finish_job,
    new_node,
    publishing,
    renamed,
    state_of,
    step_of,
    store_scp,
    to_peer,
    wait_until,
    write_seg,
)
from pynetdicom import evt

from medseg_pipelines.hospital.database import destinations
from medseg_pipelines.hospital.deliveries import open_deliveries
from medseg_pipelines.hospital.dimse import server_context
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.settings import TlsSettings


@pytest.fixture(scope="module")
def seg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seg") / "seg.dcm"
    write_seg(path)
    return path


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[OrthancPeer]:
    """One of the test's own, not started."""
    peer = new_orthanc(tmp_path / "pacs")
    yield peer
    kill(peer)


def kill(peer: OrthancPeer) -> None:
    """As a power cut does."""
    if peer._process is not None:
        peer._process.kill()
        peer._process.wait()
        peer._process = None


def test_a_segmentation_arrives_by_every_way_as_it_was_made(tmp_path: Path, seg: Path, orthanc: OrthancPeer) -> None:
    """One job to a PACS by DIMSE, to a folder with its NIfTI, then to the emptied PACS by DICOMweb."""
    orthanc.clear()
    (tmp_path / "share").mkdir()
    nifti = tmp_path / "mask.nii.gz"
    nifti.write_bytes(gzip.compress(b"a mask"))
    values = to_peer(orthanc.dicom_port, ae_title="ORTHANC")
    values["dicomweb"] = {"web": {"url": orthanc.dicomweb_url + "/"}}
    values["publish"]["destinations"] += [
        {"name": "share", "folder": tmp_path / "share"},
        {"name": "web", "dicomweb": "web"},
    ]
    node = new_node(tmp_path / "node", **values)
    want = pydicom.dcmread(seg)
    sends = [("out", "dicom-seg"), ("share", "dicom-seg"), ("share", "nifti")]
    files = {"dicom-seg": seg, "nifti": nifti}
    with publishing(node):
        job = finish_job(node, files, sends)
        wait_until(node, job, "done", destination="share", format="nifti")
        wait_until(node, job, "done", destination="share")
        row = wait_until(node, job, "done")
        assert row.confirmed_at >= row.sent_at
        assert step_of(node, job) == "confirmed"
        same_object(want, orthanc.file_of(str(want.SOPInstanceUID)))
        assert sorted(path.name for path in (tmp_path / "share").iterdir()) == [f"{job}.nii.gz", f"{job}.seg.dcm"]
        assert (tmp_path / "share" / f"{job}.seg.dcm").read_bytes() == seg.read_bytes()
        assert (tmp_path / "share" / f"{job}.nii.gz").read_bytes() == nifti.read_bytes()
        orthanc.clear()
        # the second one is of the same object: stored already is no failure
        for number in (1, 2):
            job = finish_job(node, files, [("web", "dicom-seg")], number=number)
            wait_until(node, job, "done", destination="web")
        same_object(want, orthanc.file_of(str(want.SOPInstanceUID)))
    assert orthanc.instances() == [want.SOPInstanceUID]
    assert [event["destination"] for event in audit_events(node, "sent")].count("web") == 2
    assert len(audit_events(node, "confirmed")) == 5


def same_object(want: pydicom.Dataset, found: bytes) -> None:
    got = pydicom.dcmread(io.BytesIO(found))
    for name in ("SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert got[name].value == want[name].value
    assert got.PixelData == want.PixelData


def test_two_sends_of_one_file_leave_one_instance(tmp_path: Path, seg: Path, orthanc: OrthancPeer) -> None:
    orthanc.clear()
    node = new_node(tmp_path, **to_peer(orthanc.dicom_port))
    with publishing(node):
        for number in (1, 2):
            wait_until(node, finish_job(node, {"dicom-seg": seg}, number=number), "done")
    assert len(audit_events(node, "sent")) == 2
    assert len(orthanc.instances()) == 1


def finish_jobs(node: Node, seg: Path, count: int, *sends: tuple[str, str]) -> tuple[list[str], list[str]]:
    """Jobs that made an object each; their IDs, and the SOP Instance UIDs."""
    uids, held = [], []
    one = node.settings.folder / "one.dcm"
    for number in range(count):
        uids.append(renamed(seg, one, number))
        held.append(finish_job(node, {"dicom-seg": one}, sends or SENDS, number=number))
    return held, sorted(uids)


def test_a_pacs_that_is_down_gets_all_when_it_is_back(tmp_path: Path, seg: Path, pacs: OrthancPeer) -> None:
    (tmp_path / "share").mkdir()
    values = to_peer(pacs.dicom_port)
    values["publish"]["destinations"].append({"name": "share", "folder": tmp_path / "share"})
    node = new_node(tmp_path / "node", **values)
    held, uids = finish_jobs(node, seg, 10, ("out", "dicom-seg"), ("share", "dicom-seg"))
    with publishing(node):
        # the folder is not held up by the peer
        for job in held:
            wait_until(node, job, "done", destination="share")
        wait_for(lambda: (row := rests(node)) and row.failures >= 3)
        # one is tried at a time: not each of them meets the dead peer
        assert len(audit_events(node, "failed")) < len(held)
        assert all("nothing answers" in state_of(node, job).reason for job in held)
        assert {step_of(node, job) for job in held} == {"encoded"}
        pacs.start()
        for job in held:
            wait_until(node, job, "done")
        assert pacs.instances() == uids
        assert (rests(node).failures, rests(node).reason) == (0, "")


def rests(node: Node) -> Any:
    with node.database.reading() as connection:
        return connection.execute(sa.select(destinations).where(destinations.c.name == "out")).one_or_none()


def test_a_pacs_killed_in_the_middle_has_each_object_once_in_the_end(
    tmp_path: Path, seg: Path, pacs: OrthancPeer
) -> None:
    pacs.start()
    node = new_node(tmp_path / "node", **to_peer(pacs.dicom_port))
    held, uids = finish_jobs(node, seg, 20)
    with publishing(node):
        wait_for(lambda: len(audit_events(node, "sent")) >= 3, every_s=0.002)
        kill(pacs)
        assert any(state_of(node, job).state != "done" for job in held)
        pacs.start()
        for job in held:
            wait_until(node, job, "done")
    assert pacs.instances() == uids


KILLED = """
import os, signal, sys, threading
from medseg_pipelines.hospital.deliveries import Deliveries
from medseg_pipelines.hospital.node import open_node
from medseg_pipelines.hospital.publish import Publisher
from medseg_pipelines.hospital.settings import NodeSettings
Deliveries.sent = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
node = open_node(NodeSettings.model_validate_json(sys.argv[1]), "worker")
Publisher(node).run(threading.Event())
"""


def test_killed_between_sending_and_writing_it_down(tmp_path: Path, seg: Path, orthanc: OrthancPeer) -> None:
    orthanc.clear()
    node = new_node(tmp_path, **to_peer(orthanc.dicom_port))
    job = finish_job(node, {"dicom-seg": seg})
    command = [sys.executable, "-c", KILLED, node.settings.model_dump_json()]
    ended = subprocess.run(command, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(orthanc.instances()) == 1
    assert state_of(node, job).state == "sending"
    with publishing(node):
        # the same name starts again: it need not wait for the lease
        row = wait_until(node, job, "done", seconds=node.settings.worker.lease_s - 1)
    assert row.attempts == 2
    assert len(orthanc.instances()) == 1


def test_another_worker_takes_over_when_the_lease_is_over(tmp_path: Path, seg: Path) -> None:
    got, port = Received(), free_port()
    node = new_node(tmp_path, **to_peer(port), worker={"lease_s": 1.0})
    job = finish_job(node, {"dicom-seg": seg})
    held = open_deliveries(node)
    gone = held.claim("out", "a-worker-that-is-gone", most=8)
    assert gone is not None
    with store_scp(port, got), publishing(node):
        row = wait_until(node, job, "done")
    assert row.attempts == 2
    assert not held.sent(gone, gone.deliveries[0], confirmed=True)
    assert len(audit_events(node, "sent")) == 1


@pytest.mark.parametrize(("break_it", "told"), [("remove", "missing"), ("change", "was changed since it was made")])
def test_a_file_that_is_not_what_it_was_is_never_sent(tmp_path: Path, seg: Path, break_it: str, told: str) -> None:
    got, port = Received(), free_port()
    node = new_node(tmp_path, **to_peer(port))
    job, other = (finish_job(node, {"dicom-seg": seg}, number=number) for number in (0, 1))
    file = node.store.results / job / "dicom-seg.dcm"
    if break_it == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with store_scp(port, got), publishing(node):
        row = wait_until(node, job, "dead")
        wait_until(node, other, "done")
    assert told in row.reason
    assert row.attempts == 1
    assert len(got.at) == 1
    assert [event["job"] for event in audit_events(node, "dead")] == [job]


def unreadable(node: Node, job: str) -> Path:
    """Puts a folder in the place of a file, which the superuser cannot read either; the file's path."""
    file = node.store.results / job / "dicom-seg.dcm"
    file.unlink()
    file.mkdir()
    return file


def test_a_file_that_cannot_be_read_waits_by_itself(tmp_path: Path, seg: Path) -> None:
    got, port = Received(), free_port()
    node = new_node(tmp_path, **to_peer(port))
    job, *others = (finish_job(node, {"dicom-seg": seg}, number=number) for number in range(4))
    file = unreadable(node, job)
    with store_scp(port, got), publishing(node):
        for other in others:
            wait_until(node, other, "done")
        # in less time than two leases of four seconds
        row = wait_for(lambda: (row := state_of(node, job)).attempts >= 2 and row, seconds=7)
        assert row.reason == "its file in the results of the job cannot be read (Is a directory); check the disk"
        assert row.first_tried_at is not None
        # the peer is not to blame
        assert rests(node).failures == 0
        file.rmdir()
        file.write_bytes(seg.read_bytes())
        wait_until(node, job, "done")
    assert {event["job"] for event in audit_events(node, "failed")} == {job}


def test_results_whose_disk_is_away_wait(tmp_path: Path, seg: Path) -> None:
    got, port = Received(), free_port()
    node = new_node(tmp_path, **to_peer(port))
    job = finish_job(node, {"dicom-seg": seg})
    # as an unmounted share: its mount point is there, and empty
    results, away = node.store.results, tmp_path / "away"
    results.rename(away)
    results.mkdir()
    with store_scp(port, got), publishing(node):
        row = wait_for(lambda: (row := state_of(node, job)).attempts and row)
        assert row.state in ("waiting", "sending")
        assert "cannot be read (No such file or directory)" in row.reason
        results.rmdir()
        away.rename(results)
        wait_until(node, job, "done")


def test_a_file_that_cannot_be_read_is_given_up_and_says_nothing_of_the_peer(tmp_path: Path, seg: Path) -> None:
    values = to_peer(free_port())
    values["publish"]["give_up_h"] = 0.5 / 3600
    node = new_node(tmp_path, **values)
    job = finish_job(node, {"dicom-seg": seg})
    unreadable(node, job)
    held = open_deliveries(node)
    held.prepare(["out"])
    batch = held.claim("out", "another", most=8)
    assert batch is not None
    # that the peer is down was found by another
    held.down(batch, batch.deliveries, "nothing answers", during=None)
    before = rests(node).failures
    with publishing(node):
        wait_until(node, job, "dead")
    assert rests(node).failures == before == 1
    assert [event["job"] for event in audit_events(node, "dead")] == [job]


def test_what_was_sent_and_cannot_be_read_says_so_and_nothing_of_the_peer(tmp_path: Path, seg: Path) -> None:
    values = to_peer(free_port(), commitment=True)
    values["publish"] |= {"give_up_h": 2 / 3600, "commitment_wait_s": 0.2}
    node = new_node(tmp_path, worker={"lease_s": 60.0}, **values)
    job = finish_job(node, {"dicom-seg": seg})
    held = open_deliveries(node)
    held.prepare(["out"])
    batch = held.claim("out", "another", most=8)
    assert batch is not None
    assert held.sent(batch, batch.deliveries[0], confirmed=False)
    asked = held.claim_unconfirmed("out", "another", most=8)
    assert asked is not None
    # that the peer is down was found by another
    held.down(asked, asked.deliveries, "nothing answers", during=None)
    unreadable(node, job)
    why = "its file in the results of the job cannot be read (Is a directory); check the disk"
    with publishing(node):
        wait_for(lambda: state_of(node, job).reason == why)
        # the peer is no longer kept for this one alone to try, which would be for a lease
        assert wait_until(node, job, "dead").reason == why
    assert (rests(node).failures, rests(node).reason) == (1, "nothing answers")
    assert [event["reason"] for event in audit_events(node, "dead")] == [why]


def test_a_store_whose_disk_gives_errors_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    node = new_node(tmp_path)
    assert node.store.is_here()
    with monkeypatch.context() as broken:
        broken.setattr(os, "stat", stale)
        assert not node.store.is_here()


@pytest.mark.parametrize("how", ["status", "context"])
def test_a_class_that_is_refused_for_good_is_dead_at_once(tmp_path: Path, seg: Path, how: str) -> None:
    got, port = Received(0x0122), free_port()
    node = new_node(tmp_path, **to_peer(port))
    job = finish_job(node, {"dicom-seg": seg})
    classes = ["1.2.840.10008.5.1.4.1.1.66.4"] if how == "status" else ["1.2.840.10008.5.1.4.1.1.2"]
    with store_scp(port, got, classes=classes), publishing(node) as publisher:
        row = wait_until(node, job, "dead")
        assert "does not take objects of this class" in row.reason
        assert row.attempts == 1
        # the peer is not to blame for the rest
        assert rests(node).failures == 0
    got.status = 0x0000
    assert publisher._deliveries.replay(job) == 1
    with store_scp(port, got), publishing(node):
        wait_until(node, job, "done")


def test_what_is_refused_for_now_is_tried_until_it_is_given_up(tmp_path: Path, seg: Path) -> None:
    got, port = Received(0xC000), free_port()
    values = to_peer(port)
    values["publish"]["give_up_h"] = 1.0 / 3600
    node = new_node(tmp_path, **values)
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got), publishing(node):
        row = wait_until(node, job, "dead")
    assert "status 0xC000" in row.reason
    assert row.attempts == len(got.at) >= 3
    waits = [after - before for before, after in zip(got.at, got.at[1:])]
    # 0.1 s, then 0.2 s, … each looked for every quarter of a second
    assert waits[0] >= 0.1
    assert waits[1] >= 0.2
    assert len(audit_events(node, "failed")) == row.attempts
    assert len(audit_events(node, "dead")) == 1


def test_a_peer_that_is_never_there_is_given_up_for_all(tmp_path: Path, seg: Path) -> None:
    values = to_peer(free_port())
    values["publish"]["give_up_h"] = 0.5 / 3600
    node = new_node(tmp_path, **values)
    held = [finish_job(node, {"dicom-seg": seg}, number=number) for number in range(3)]
    with publishing(node):
        for job in held:
            assert "nothing answers" in wait_until(node, job, "dead").reason
    assert sorted(event["job"] for event in audit_events(node, "dead")) == sorted(held)


def test_an_object_that_breaks_the_peer_does_not_hold_up_the_others(tmp_path: Path, seg: Path) -> None:
    got, port = Received(), free_port()

    def take(event: evt.Event) -> int:
        if str(event.request.AffectedSOPInstanceUID) == poison:
            event.assoc.abort()
            return 0x0110
        return got(event)

    node = new_node(tmp_path, **to_peer(port))
    poison = renamed(seg, tmp_path / "one.dcm", 0)
    bad = finish_job(node, {"dicom-seg": tmp_path / "one.dcm"}, number=0)
    good = []
    for number in range(1, 10):
        renamed(seg, tmp_path / "one.dcm", number)
        good.append(finish_job(node, {"dicom-seg": tmp_path / "one.dcm"}, number=number))
    with store_scp(port, take), publishing(node):
        for job in good:
            wait_until(node, job, "done")
        row = wait_for(lambda: (row := state_of(node, bad)).attempts >= 2 and row)
    assert row.state in ("waiting", "sending")
    assert "broke in the middle" in row.reason
    assert len(got.objects) == 9


def test_a_silent_peer_does_not_slow_the_others(tmp_path: Path, seg: Path) -> None:
    """It takes connections, and never says a word."""
    (tmp_path / "share").mkdir()
    with socket.create_server((HOST, 0)) as silent:
        values = to_peer(silent.getsockname()[1])
        values["publish"] |= {"timeout_s": 30.0}
        values["publish"]["destinations"].append({"name": "share", "folder": tmp_path / "share"})
        node = new_node(tmp_path / "node", **values)
        sends = [("out", "dicom-seg"), ("share", "dicom-seg")]
        held = [finish_job(node, {"dicom-seg": seg}, sends, number=number) for number in range(10)]
        with publishing(node):
            for job in held:
                wait_until(node, job, "done", destination="share")
            assert state_of(node, held[0]).reason == ""
            silent.close()
            # whoever connected is answered by a reset, and by nobody later
            assert wait_for(lambda: state_of(node, held[0]).reason)


def test_a_full_peer_rests(tmp_path: Path, seg: Path) -> None:
    got, port = Received(0xA700), free_port()
    node = new_node(tmp_path, **to_peer(port))
    held = [finish_job(node, {"dicom-seg": seg}, number=number) for number in range(10)]
    with store_scp(port, got), publishing(node):
        wait_for(lambda: (row := rests(node)) and row.failures >= 2)
        assert "out of resources" in rests(node).reason
        got.status = 0x0000
        for job in held:
            wait_until(node, job, "done")


def test_a_rejected_association_says_what_to_check(tmp_path: Path, seg: Path) -> None:
    got, port = Received(), free_port()
    node = new_node(tmp_path, **to_peer(port, ae_title="WRONG"))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got, strict=True), publishing(node):
        row = wait_for(lambda: (row := state_of(node, job)).reason and row)
    assert row.state in ("waiting", "sending")
    assert "WRONG" in row.reason
    assert "check the AE titles" in row.reason
    assert got.objects == {}


def test_a_peer_of_the_default_transfer_syntax_alone_gets_the_same_object(tmp_path: Path, seg: Path) -> None:
    got, port = Received(), free_port()
    node = new_node(tmp_path, **to_peer(port))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got, syntaxes=[IMPLICIT]), publishing(node):
        wait_until(node, job, "done")
    (found,) = got.objects.values()
    assert found.file_meta.TransferSyntaxUID == IMPLICIT
    want = pydicom.dcmread(seg)
    assert found.PixelData == want.PixelData
    # whose kind of bytes the default transfer syntax does not tell
    del found.PixelData, want.PixelData
    assert found == want


def test_a_peer_with_tls_on_both_sides(tmp_path: Path, seg: Path) -> None:
    made = certificates(tmp_path)
    ours = {name: made[name] for name in ("certificate", "key", "authority")}
    got, port = Received(), free_port()
    node = new_node(tmp_path / "node", **to_peer(port, tls=ours))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got, tls=server_context(TlsSettings(**ours))), publishing(node):
        wait_until(node, job, "done")
    assert len(got.objects) == 1


def test_plain_text_to_a_tls_port_says_so(tmp_path: Path, seg: Path) -> None:
    made = certificates(tmp_path)
    ours = TlsSettings(certificate=made["certificate"], key=made["key"])
    got, port = Received(), free_port()
    node = new_node(
        tmp_path / "node",
        **to_peer(port),
    )
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got, tls=server_context(ours)), publishing(node):
        row = wait_for(lambda: (row := state_of(node, job)).reason and row)
    assert row.state in ("waiting", "sending")
    assert "check" in row.reason
    assert got.objects == {}


def test_a_folder_that_is_not_there_is_waited_for_and_parts_are_swept(tmp_path: Path, seg: Path) -> None:
    share = tmp_path / "share"
    node = new_node(tmp_path / "node", publish={"destinations": [{"name": "out", "folder": share}]})
    job = finish_job(node, {"dicom-seg": seg})
    with publishing(node):
        row = wait_for(lambda: (row := state_of(node, job)).reason and row)
        assert "mount the share" in row.reason
        assert not share.exists()
        share.mkdir()
        (share / f".{job}.seg.dcm.0a0a0a0a.part").write_bytes(b"of one that was killed")
        wait_until(node, job, "done")
    assert [path.name for path in share.iterdir()] == [f"{job}.seg.dcm"]


def test_a_destination_that_is_not_in_the_settings_is_told(tmp_path: Path, seg: Path) -> None:
    node = new_node(tmp_path)
    job = finish_job(node, {"dicom-seg": seg}, [("gone", "dicom-seg")])
    with publishing(node):
        row = wait_for(lambda: (row := state_of(node, job, "gone")).reason and row)
    assert row.state == "waiting"
    assert "not in the settings" in row.reason


def test_nothing_of_the_patient_is_told(tmp_path: Path, seg: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The object is Jane Doe's, and the peer quotes her in its answers."""
    port = free_port()

    def take(event: evt.Event) -> pydicom.Dataset:
        answer = pydicom.Dataset()
        answer.Status, answer.ErrorComment = 0xA900, "Doe^Jane is no good"
        return answer

    caplog.set_level(logging.DEBUG)
    node = new_node(tmp_path, **to_peer(port))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, take), publishing(node):
        row = wait_for(lambda: (row := state_of(node, job)).attempts >= 1 and row)
    assert "0xA900" in row.reason
    ours = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("pynetdicom"))
    assert "0xA900" in ours
    for text in (ours, row.reason, node.audit.path.read_text()):
        assert "Doe" not in text
