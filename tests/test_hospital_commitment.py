"""Storage commitment: asked for, reported on the same association, on another one or never; and by a real PACS."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
import sqlalchemy as sa
from hospital_node import gateway
from hospital_peers import HOST, OrthancPeer, free_port, wait_for
from hospital_publishing import (
    EXPLICIT,
    Received,
    audit_events,
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
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pynetdicom import AE, build_role, evt

from medseg_pipelines.hospital.commitment import Reports
from medseg_pipelines.hospital.database import commitments, deliveries
from medseg_pipelines.hospital.deliveries import Delivery
from medseg_pipelines.hospital.dimse import associated
from medseg_pipelines.hospital.settings import PeerSettings

VERIFICATION = "1.2.840.10008.1.1"
PUSH_MODEL, PUSH_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
KEPT, FAILURES = 1, 2


@pytest.fixture(scope="module")
def seg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seg") / "seg.dcm"
    write_seg(path)
    return path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg_pipelines.hospital.commitment.SAME_S", 0.5)


def test_a_report_that_is_answered_during_the_release_keeps_nobody_waiting() -> None:
    port = free_port()
    server = AE("PACS")
    server.add_supported_context(VERIFICATION, EXPLICIT)
    running = server.start_server((HOST, port), block=False)
    peer = PeerSettings(ae_title="PACS", host=HOST, port=port)
    released = threading.Event()

    def ask() -> None:
        contexts, handlers = [(VERIFICATION, [EXPLICIT])], [(evt.EVT_N_EVENT_REPORT, lambda event: (0, None))]
        with associated(peer, ae_title="MEDSEG", contexts=contexts, timeout_s=5, handlers=handlers) as made:
            # asked to stand still, the reactor does; then the thread of the report ends, and says that it runs
            made._reactor_checkpoint.clear()
            wait_for(lambda: made._is_paused)
            made._is_paused = False
        if made.is_released:
            released.set()

    try:
        threading.Thread(target=ask, daemon=True).start()
        assert released.wait(10)
    finally:
        running.shutdown()


def report_on(request: Dataset, failed: dict[str, int]) -> tuple[Dataset, int]:
    """What a peer reports of a request, and the event: all is kept but `failed`, UID → reason."""
    report = Dataset()
    report.TransactionUID = request.TransactionUID
    kept, not_kept = [], []
    for item in request.ReferencedSOPSequence:
        one = Dataset()
        one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = (
            item.ReferencedSOPClassUID,
            item.ReferencedSOPInstanceUID,
        )
        if (reason := failed.get(str(item.ReferencedSOPInstanceUID))) is None:
            kept.append(one)
        else:
            one.FailureReason = reason
            not_kept.append(one)
    if kept:
        report.ReferencedSOPSequence = kept
    if not_kept:
        report.FailedSOPSequence = not_kept
    return report, FAILURES if not_kept else KEPT


@dataclass
class Committing:
    """A peer's answer to storage commitment: `how` tells the report's way, `failed` what it does not keep."""

    how: Callable[[evt.Event, Dataset, int], None]
    failed: dict[str, int] = field(default_factory=dict)
    status: int = 0x0000
    requests: list[Dataset] = field(default_factory=list)

    def __call__(self, event: evt.Event) -> tuple[int, None]:
        request = event.action_information
        self.requests.append(request)
        report, kind = report_on(request, self.failed)
        # the answer goes out before the report
        threading.Timer(0.05, self.how, (event, report, kind)).start()
        return self.status, None

    @property
    def offered(self) -> dict[str, Any]:
        """For `store_scp`."""
        return {"handlers": [(evt.EVT_N_ACTION, self)], "contexts": [(PUSH_MODEL, [EXPLICIT])]}


def on_the_same(event: evt.Event, report: Dataset, kind: int) -> None:
    event.assoc.send_n_event_report(report, kind, PUSH_MODEL, PUSH_INSTANCE)


def never(event: evt.Event, report: Dataset, kind: int) -> None:
    pass


def on_another(port: int) -> Callable[[evt.Event, Dataset, int], None]:
    def send(event: evt.Event, report: Dataset, kind: int) -> None:
        assert report_to(port, report, kind) == 0x0000

    return send


def report_to(port: int, report: Dataset, kind: int = KEPT, *, calling: str = "PACS") -> int | None:
    """The status that a report on an association of its own is answered with; None where there is none."""
    ae = AE(ae_title=calling)
    ae.add_requested_context(PUSH_MODEL, EXPLICIT)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = 10
    made = ae.associate(HOST, port, ae_title="MEDSEG", ext_neg=[build_role(PUSH_MODEL, scp_role=True)])
    if not made.is_established:
        return None
    answer, _ = made.send_n_event_report(report, kind, PUSH_MODEL, PUSH_INSTANCE)
    made.release()
    return answer.get("Status")


def settings(port: int, **publish: Any) -> dict[str, Any]:
    values = to_peer(port, commitment=True)
    values["publish"] |= {"commitment_wait_s": 0.2} | publish
    return values


def waiting_reports(node: Any) -> int:
    with node.database.reading() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(commitments)))


def test_confirmed_on_the_same_association(tmp_path: Path, seg: Path) -> None:
    got, port, commits = Received(), free_port(), Committing(on_the_same)
    node = new_node(tmp_path, **settings(port))
    held = []
    for number in range(3):
        renamed(seg, tmp_path / "one.dcm", number)
        held.append(finish_job(node, {"dicom-seg": tmp_path / "one.dcm"}, number=number))
    with store_scp(port, got, **commits.offered), publishing(node):
        for job in held:
            row = wait_until(node, job, "done")
            assert row.confirmed_at > row.sent_at
            assert step_of(node, job) == "confirmed"
    asked = {str(i.ReferencedSOPInstanceUID) for r in commits.requests for i in r.ReferencedSOPSequence}
    assert asked == set(got.objects)
    assert waiting_reports(node) == 0
    assert [len(audit_events(node, event)) for event in ("sent", "confirmed", "failed")] == [3, 3, 0]


def reporting_to(own: int, **publish: Any) -> dict[str, Any]:
    """Settings of a node whose gateway listens at `own`, and takes what PACS sends."""
    gateway = {"port": own, "ae_title": "GATEWAY", "allow": [{"ae_title": "PACS"}]}
    values = settings(free_port(), **publish)
    return values | {"gateway": gateway, "storage": {"least_free_gb": 0.0}}


def test_confirmed_at_the_gateway(tmp_path: Path, seg: Path) -> None:
    got, own = Received(), free_port()
    commits = Committing(on_another(own))
    # asked once: the report that comes later is not missed
    node = new_node(tmp_path, **reporting_to(own, commitment_wait_s=60.0))
    job = finish_job(node, {"dicom-seg": seg})
    with gateway(node.settings) as other, store_scp(port_of(node), got, **commits.offered), publishing(node):
        wait_until(node, job, "done")
        # of another one it takes none
        assert report_to(own, report_on(commits.requests[0], {})[0], calling="STRANGER") is None
        # this one it has settled already
        assert report_to(own, report_on(commits.requests[0], {})[0]) == 0x0115
        assert [event["job"] for event in audit_events(other, "confirmed")] == [job]
    assert len(commits.requests) == 1


def port_of(node: Any) -> int:
    return int(node.settings.peers["pacs"].port)


def test_what_the_peer_does_not_keep_is_sent_again(tmp_path: Path, seg: Path) -> None:
    got, port, commits = Received(), free_port(), Committing(on_the_same)
    uid = str(pydicom.dcmread(seg).SOPInstanceUID)
    commits.failed[uid] = 0x0112
    node = new_node(tmp_path, **settings(port))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got, **commits.offered), publishing(node):
        wait_for(lambda: len(got.at) >= 2)
        assert step_of(node, job) != "confirmed"
        (first, *_) = audit_events(node, "failed")
        assert "not kept" in first["reason"]
        commits.failed.clear()
        wait_until(node, job, "done")
    assert waiting_reports(node) == 0


def test_silence_is_asked_about_again_until_it_is_given_up(tmp_path: Path, seg: Path) -> None:
    got, port, commits = Received(), free_port(), Committing(never)
    node = new_node(tmp_path, **settings(port, give_up_h=4 / 3600))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got, **commits.offered), publishing(node):
        row = wait_until(node, job, "sent")
        assert step_of(node, job) == "published"
        row = wait_until(node, job, "dead")
    assert len(commits.requests) >= 2
    assert len({str(request.TransactionUID) for request in commits.requests}) == len(commits.requests)
    # it is there: sent once
    assert len(got.at) == 1
    assert row.sent_at is not None
    assert "never confirmed" in audit_events(node, "dead")[0]["reason"]


def test_what_was_sent_and_cannot_be_read_any_more_is_asked_about_once_it_can(tmp_path: Path, seg: Path) -> None:
    got, port, commits = Received(), free_port(), Committing(on_the_same)
    node = new_node(tmp_path, **settings(port))
    job = finish_job(node, {"dicom-seg": seg})
    file = node.store.results / job / "dicom-seg.dcm"

    def take(event: evt.Event) -> int:
        file.unlink()
        # a folder in its place, which the superuser cannot read either
        file.mkdir()
        return got(event)

    with store_scp(port, take, **commits.offered), publishing(node):
        sent = wait_until(node, job, "sent")
        row = wait_for(lambda: (row := state_of(node, job)).not_before > sent.not_before and row)
        assert row.state == "sent"
        assert commits.requests == []
        file.rmdir()
        file.write_bytes(seg.read_bytes())
        wait_until(node, job, "done")
    assert len(got.at) == 1


@pytest.mark.parametrize(("offered", "told"), [(False, "does not offer storage commitment"), (True, "status 0x0110")])
def test_a_peer_without_commitment_still_gets_all(tmp_path: Path, seg: Path, offered: bool, told: str) -> None:
    got, port, commits = Received(), free_port(), Committing(never, status=0x0110)
    node = new_node(tmp_path, **settings(port))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got, **commits.offered if offered else {}), publishing(node):
        row = wait_for(lambda: (row := state_of(node, job)).reason and row)
        assert told in row.reason
        assert row.state == "sent"
        wait_until(node, finish_job(node, {"dicom-seg": seg}, number=1), "sent")


def test_commitment_that_is_not_asked_for_any_more_is_not_waited_for(tmp_path: Path, seg: Path) -> None:
    got, port = Received(), free_port()
    node = new_node(tmp_path, **settings(port))
    job = finish_job(node, {"dicom-seg": seg})
    with store_scp(port, got):
        with publishing(node):
            wait_until(node, job, "sent")
        with publishing(new_node(tmp_path, **to_peer(port))):
            wait_until(node, job, "done")
    assert step_of(node, job) == "confirmed"


def test_a_real_pacs_confirms_to_the_gateway(tmp_path: Path, seg: Path, orthanc: OrthancPeer) -> None:
    """As `medseg-hospital run` has it: Orthanc knows one address of ours, that of the gateway."""
    orthanc.clear()
    own = free_port()
    orthanc.know("MEDSEG", own)
    values = reporting_to(own)
    # it reports under the title that it was called by
    values["peers"]["pacs"]["port"] = orthanc.dicom_port
    node = new_node(tmp_path, **values)
    with gateway(node.settings), publishing(node):
        job = finish_job(node, {"dicom-seg": seg})
        row = wait_until(node, job, "done")
        assert step_of(node, job) == "confirmed"
        assert orthanc.instances() == [pydicom.dcmread(seg).SOPInstanceUID]
        # what it has lost it says it has not, and gets it again
        orthanc.clear()
        with node.database.writing() as connection:
            anew = {"state": "sent", "not_before": 0.0}
            connection.execute(deliveries.update().where(deliveries.c.job_id == job).values(anew))
        wait_for(lambda: orthanc.instances())
        row = wait_until(node, job, "done")
    assert row.attempts == 2


def test_reports_that_mean_nothing_change_nothing(tmp_path: Path, seg: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "medseg_pipelines")
    own, commits = free_port(), Committing(never)
    node = new_node(tmp_path, **reporting_to(own, commitment_wait_s=60.0))
    job = finish_job(node, {"dicom-seg": seg})
    with gateway(node.settings), store_scp(port_of(node), Received(), **commits.offered), publishing(node):
        wait_for(lambda: commits.requests)
        report, _ = report_on(commits.requests[0], {})
        unknown, empty, silent = copy.deepcopy(report), Dataset(), Dataset()
        unknown.TransactionUID = "2.25.1"
        empty.PatientName = "Doe^Jane"
        silent.TransactionUID = report.TransactionUID
        for broken, kind, status in (
            (unknown, 1, 0x0115),
            (empty, 1, 0x0115),
            (report, 7, 0x0113),
            (silent, 1, 0x0000),
        ):
            assert report_to(own, broken, kind) == status
            assert state_of(node, job).state == "sent"
        assert report_to(own, report) == 0x0000
        wait_until(node, job, "done")
    assert "Doe" not in caplog.text


def test_a_report_whose_list_is_cut_off_is_answered_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    information = Dataset()
    information.TransactionUID = "2.25.1"
    listed = Tag("ReferencedSOPSequence")
    # pydicom looks into it only when it is asked for
    information[listed] = RawDataElement(listed, "SQ", 4, b"\xfe\xff\x00\xe0", 0, False, True)
    event = SimpleNamespace(event_type=KEPT, event_information=information)
    untouched = SimpleNamespace()
    assert Reports(untouched, untouched).hear(event) == (0x0115, None)  # type: ignore[arg-type]
    assert "cannot be understood (OSError)" in caplog.text


def test_deliveries_are_told_apart_by_their_key_alone() -> None:
    assert Delivery("j", "d", "f", 1, {"a": 1}) == Delivery("j", "d", "f", 1, {})
    assert len({Delivery("j", "d", "f", 1, {"a": 1}), Delivery("j", "d", "f", 1)}) == 1
