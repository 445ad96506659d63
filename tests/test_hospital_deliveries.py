"""The rows of what is to be sent, on both databases: leases, rests, and who gets what when several ask."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hospital_peers import wait_for
from hospital_publishing import finish_job, new_node, state_of, step_of

from medseg_pipelines.hospital.database import deliveries, destinations, jobs, series
from medseg_pipelines.hospital.deliveries import Batch, Deliveries, Delivery, Patience, open_deliveries
from medseg_pipelines.hospital.node import Node
from medseg_pipelines.hospital.replaying import replay_job

NewNode = Callable[..., Node]


@pytest.fixture(params=["sqlite", "postgresql"])
def node_of(request: pytest.FixtureRequest, tmp_path: Path) -> NewNode:
    """Makes nodes on one database."""
    database = request.getfixturevalue("postgres") if request.param == "postgresql" else None

    def make(**settings: Any) -> Node:
        return new_node(tmp_path / "node", database=database, **settings)

    return make


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.dcm"
    path.write_bytes(b"not looked at here")
    return path


def add(node: Node, file: Path, count: int = 1, *, to: str = "out", first: int = 0) -> list[str]:
    return [
        finish_job(node, {"dicom-seg": file}, [(to, "dicom-seg")], number=number)
        for number in range(first, first + count)
    ]


def sent_unconfirmed(rows: Deliveries) -> Delivery:
    """The one delivery that waits, sent; commitment is waited for."""
    batch = rows.claim("out", "w", most=8)
    assert batch is not None
    (delivery,) = batch.deliveries
    assert rows.sent(batch, delivery, confirmed=False)
    return delivery


def test_two_that_claim_at_once_get_different_deliveries(node_of: NewNode, file: Path) -> None:
    nodes = [node_of(), node_of()]
    held = add(nodes[0], file, 12)
    got: list[str] = []
    begin = threading.Barrier(4)

    def take(rows: Deliveries, worker: str) -> None:
        begin.wait()
        while (batch := rows.claim("out", worker, most=3)) is not None:
            got.extend(delivery.job_id for delivery in batch.deliveries)
            for delivery in batch.deliveries:
                assert rows.sent(batch, delivery, confirmed=True)

    threads = [
        threading.Thread(target=take, args=(open_deliveries(nodes[n % 2]), f"w{n}"), daemon=True) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(got) == sorted(held)
    assert {step_of(nodes[0], job) for job in held} == {"confirmed"}


def test_the_last_two_deliveries_of_a_job_settled_at_once_confirm_it(node_of: NewNode, file: Path) -> None:
    """Each of the two transactions must see what the other one did."""
    node = node_of()
    for number in range(3):
        sends = [("a", "dicom-seg"), ("b", "dicom-seg")]
        job = finish_job(node, {"dicom-seg": file}, sends, number=number)
        begin = threading.Barrier(2)

        def settle(name: str, begin: threading.Barrier = begin) -> None:
            rows = open_deliveries(node)
            batch = rows.claim(name, "w", most=1)
            assert batch is not None
            begin.wait()
            assert rows.sent(batch, batch.deliveries[0], confirmed=True)

        threads = [threading.Thread(target=settle, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert step_of(node, job) == "confirmed"


@pytest.mark.parametrize("damage", ["lost", "changed", ""])
def test_a_result_that_is_not_whole_is_made_again_when_its_delivery_is_replayed(
    node_of: NewNode, file: Path, damage: str
) -> None:
    node = node_of()
    (job,) = add(node, file)
    folder = node.store.results / job
    if damage == "lost":
        shutil.rmtree(folder)
    elif damage:
        (folder / "dicom-seg.dcm").write_bytes(b"other")
    with node.database.writing() as connection:
        connection.execute(deliveries.update().values(state="dead"))
    assert replay_job(node, job, user=None)
    if not damage:
        assert node.jobs.claim(node.me) is None
        assert open_deliveries(node).claim("out", "w", most=8) is not None
        return
    # what is to be sent is not there yet
    assert open_deliveries(node).claim("out", "w", most=8) is None
    again = node.jobs.claim(node.me)
    assert again is not None
    assert again.id == job
    assert node.jobs.finish(job, node.me, {}, [("out", "dicom-seg")])
    assert open_deliveries(node).claim("out", "w", most=8) is not None


def revised(node: Node, file: Path, count: int = 1) -> list[str]:
    """Jobs that are made of a series, and then one of its second revision."""
    made = add(node, file, count)
    with node.database.writing() as connection:
        connection.execute(series.update().values(revision=2))
    made += add(node, file, first=count)
    with node.database.writing() as connection:
        connection.execute(jobs.update().where(jobs.c.id == made[-1]).values(revision=2))
    return made


@pytest.mark.parametrize("state", ["waiting", "dead"])
def test_what_has_not_gone_out_of_an_earlier_revision_never_does(node_of: NewNode, file: Path, state: str) -> None:
    node = node_of()
    rows = open_deliveries(node)
    old, new = revised(node, file)
    with node.database.writing() as connection:
        connection.execute(deliveries.update().where(deliveries.c.job_id == old).values(state=state))
    assert rows.due() == {"out": {"waiting"}}
    batch = rows.claim("out", "w", most=8)
    assert batch is not None
    assert [delivery.job_id for delivery in batch.deliveries] == [new]
    assert rows.supersede() == ((old, "out", "dicom-seg"),)
    assert rows.supersede() == ()
    assert (state_of(node, old).state, step_of(node, old)) == ("superseded", "confirmed")
    assert rows.replay(old) == 0
    assert rows.sent(batch, batch.deliveries[0], confirmed=True)
    assert (rows.due(), step_of(node, new)) == ({}, "confirmed")


def test_a_later_revision_waits_until_an_earlier_one_has_arrived(node_of: NewNode, file: Path) -> None:
    """Else a slow association could bring the older result last."""
    node = node_of()
    rows = open_deliveries(node)
    (old,) = add(node, file)
    first = rows.claim("out", "w", most=8)
    assert first is not None
    with node.database.writing() as connection:
        connection.execute(series.update().values(revision=2))
    (new,) = add(node, file, first=1)
    with node.database.writing() as connection:
        connection.execute(jobs.update().where(jobs.c.id == new).values(revision=2))
    assert rows.claim("out", "w", most=8) is None
    assert rows.supersede() == ()
    assert rows.sent(first, first.deliveries[0], confirmed=True)
    second = rows.claim("out", "w", most=8)
    assert second is not None
    assert [delivery.job_id for delivery in second.deliveries] == [new]
    assert state_of(node, old).state == "done"


def test_a_job_is_published_when_all_is_sent(node_of: NewNode, file: Path) -> None:
    node = node_of()
    rows = open_deliveries(node)
    job = finish_job(node, {"dicom-seg": file}, [("a", "dicom-seg"), ("b", "dicom-seg")])
    steps = [step_of(node, job)]
    for name, confirmed in (("a", True), ("b", False)):
        batch = rows.claim(name, "w", most=1)
        assert batch is not None
        assert rows.sent(batch, batch.deliveries[0], confirmed=confirmed)
        steps.append(step_of(node, job))
    rows.confirm_all("b")
    assert [*steps, step_of(node, job)] == ["encoded", "encoded", "published", "confirmed"]


def test_a_lease_that_is_not_renewed_is_over(node_of: NewNode, file: Path) -> None:
    # longer than a busy machine stands still between two lines
    node = node_of(worker={"lease_s": 4.0})
    rows = open_deliveries(node)
    kept, lost = add(node, file, 2)
    first, second = (rows.claim("out", "w", most=1) for _ in range(2))
    assert first is not None
    assert second is not None
    assert [b.deliveries[0].job_id for b in (first, second)] == sorted((kept, lost))

    def freed() -> int:
        assert rows.renew([first.token]) == 1
        return rows.release_expired()

    assert wait_for(freed, seconds=10) == 1
    other = rows.claim("out", "another", most=8)
    assert other is not None
    assert [d.job_id for d in other.deliveries] == [second.deliveries[0].job_id]
    # whoever was too slow changes nothing
    assert not rows.sent(second, second.deliveries[0], confirmed=True)
    assert rows.later(second, second.deliveries[0], "no") == "lost"
    assert not rows.never(second, second.deliveries[0], "no")
    rows.put_back(second, second.deliveries)
    assert state_of(node, second.deliveries[0].job_id).state == "sending"
    assert rows.sent(first, first.deliveries[0], confirmed=True)


def test_one_that_ends_its_sender_again_and_again_waits_longer(node_of: NewNode, file: Path) -> None:
    node = node_of(publish={"retry_s": 30.0, "most_retry_s": 40.0})
    rows = open_deliveries(node)
    (job,) = add(node, file)
    waits = []
    for _ in range(4):
        with node.database.writing() as connection:
            connection.execute(deliveries.update().values(not_before=0.0))
        batch = rows.claim("out", "w", most=1)
        assert batch is not None
        assert rows.give_back("w") == 1
        waits.append(round(state_of(node, job).not_before - batch.claimed_at, -1))
    assert waits == [0, 30, 40, 40]


def test_a_destination_that_fails_rests_and_is_tried_by_one(node_of: NewNode, file: Path) -> None:
    node = node_of(publish={"retry_s": 60.0, "most_retry_s": 60.0})
    rows = open_deliveries(node)
    add(node, file, 6)
    (elsewhere,) = add(node, file, to="other", first=6)
    first, second = (rows.claim("out", "w", most=2) for _ in range(2))
    assert first is not None
    assert second is not None
    for batch in (first, second):
        assert rows.down(batch, batch.deliveries, "gone", during=None) == ()
    # two that broke together are one failure
    assert row_of(node).failures == 1
    assert rows.claim("out", "w", most=8) is None
    assert "out" not in rows.due()
    # another destination is not its business
    other = rows.claim("other", "w", most=8)
    assert other is not None
    assert [d.job_id for d in other.deliveries] == [elsewhere]
    probe = claim_when_due(node, rows)
    assert probe is not None
    assert len(probe.deliveries) == 1
    assert rows.claim("out", "another", most=8) is None
    assert rows.down(probe, probe.deliveries, "gone", during=None) == ()
    assert row_of(node).failures == 2
    probe = claim_when_due(node, rows)
    assert probe is not None
    assert rows.sent(probe, probe.deliveries[0], confirmed=True)
    rest = rows.claim("out", "another", most=8)
    assert rest is not None
    assert len(rest.deliveries) == 5


def test_a_try_that_says_nothing_of_the_destination_leaves_it_to_the_next(node_of: NewNode, file: Path) -> None:
    """The one that was to show whether the peer is back had lost its file."""
    node = node_of(publish={"retry_s": 60.0, "most_retry_s": 60.0}, worker={"lease_s": 600.0})
    rows = open_deliveries(node)
    add(node, file, 3)
    batch = rows.claim("out", "w", most=3)
    assert batch is not None
    rows.down(batch, batch.deliveries, "gone", during=None)
    probe = claim_when_due(node, rows)
    assert probe is not None
    assert rows.never(probe, probe.deliveries[0], "missing")
    rows.put_back(probe, [])
    probe = rows.claim("out", "w", most=8)
    assert probe is not None
    assert len(probe.deliveries) == 1


def claim_when_due(node: Node, rows: Deliveries) -> Batch | None:
    """What is claimed once the destination has rested."""
    with node.database.writing() as connection:
        connection.execute(destinations.update().values(not_before=0.0))
    return rows.claim("out", "w", most=8)


def row_of(node: Node, name: str = "out") -> Any:
    with node.database.reading() as connection:
        return connection.execute(sa.select(destinations).where(destinations.c.name == name)).one()


def test_the_greater_priority_goes_first(node_of: NewNode, file: Path) -> None:
    node = node_of()
    held = add(node, file, 4)
    with node.database.writing() as connection:
        connection.execute(jobs.update().where(jobs.c.id == held[2]).values(priority=5))
    batch = open_deliveries(node).claim("out", "w", most=2)
    assert batch is not None
    assert held[2] == batch.deliveries[0].job_id


def test_dead_deliveries_are_begun_anew(node_of: NewNode, file: Path) -> None:
    node = node_of()
    rows = open_deliveries(node)
    (job,) = add(node, file)
    assert rows.replay(job) == 0
    batch = rows.claim("out", "w", most=1)
    assert batch is not None
    assert rows.never(batch, batch.deliveries[0], "no")
    assert (state_of(node, job).state, state_of(node, job).reason) == ("dead", "no")
    assert rows.claim("out", "w", most=1) is None
    assert rows.replay(job) == 1
    batch = rows.claim("out", "w", most=1)
    assert batch is not None
    assert batch.deliveries[0].attempts == 0


def test_an_early_request_may_confirm_and_not_fail(node_of: NewNode, file: Path) -> None:
    """The peer takes its time, and was asked again meanwhile."""
    node = node_of()
    (job,) = add(node, file)
    rows = open_deliveries(node)
    delivery = sent_unconfirmed(rows)
    for transaction in ("1.1", "1.2"):
        with node.database.writing() as connection:
            connection.execute(deliveries.update().values(not_before=0.0))
        batch = rows.claim_unconfirmed("out", "w", most=8)
        assert batch is not None
        rows.asked(batch, {delivery: "2.25.7"}, transaction)
        assert rows.ask_again(batch, 0.01, "") == ()
    assert rows.reported("1.1", (), {"2.25.7": "lost"}) == []
    assert state_of(node, job).state == "sent"
    assert rows.reported("1.1", {"2.25.7"}, {}) == [(job, "out", "dicom-seg", "done")]
    # all requests for it are settled with that
    assert rows.reported("1.2", (), {"2.25.7": "lost"}) is None
    assert state_of(node, job).state == "done"


@pytest.mark.parametrize(("days", "state"), [(6, "waiting"), (8, "dead")])
def test_what_a_peer_takes_and_never_keeps_is_given_up(node_of: NewNode, file: Path, days: int, state: str) -> None:
    node = node_of(publish={"give_up_h": 7 * 24.0})
    (job,) = add(node, file)
    rows = open_deliveries(node)
    delivery = sent_unconfirmed(rows)
    batch = rows.claim_unconfirmed("out", "w", most=8)
    assert batch is not None
    rows.asked(batch, {delivery: "2.25.7"}, "1.1")
    with node.database.writing() as connection:
        tried = node.database.now(connection) - days * 86400
        connection.execute(deliveries.update().values(first_tried_at=tried))
    assert rows.reported("1.1", (), {"2.25.7": "no room"}) == [(job, "out", "dicom-seg", state)]
    assert (state_of(node, job).state, state_of(node, job).reason) == (state, "no room")


def test_nobody_sends_what_is_lost_while_it_is_replayed(
    node_of: NewNode, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_of()
    (job,) = add(node, file)
    shutil.rmtree(node.store.results / job)
    with node.database.writing() as connection:
        connection.execute(deliveries.update().values(state="dead"))
    replay, seen = Deliveries.replay, []

    def watched(self: Deliveries, job_id: str) -> int:
        begun = replay(self, job_id)
        seen.append(open_deliveries(node).claim("out", "w", most=8))
        return begun

    monkeypatch.setattr(Deliveries, "replay", watched)
    assert replay_job(node, job, user=None)
    assert seen == [None]


def test_what_no_destination_of_the_settings_takes_is_given_up(node_of: NewNode, file: Path) -> None:
    node = node_of(publish={"give_up_h": 1.0})
    rows = open_deliveries(node)
    (job,) = add(node, file)
    assert rows.give_up_unknown({"out"}) == ()
    assert state_of(node, job).first_tried_at is None
    assert rows.give_up_unknown({"other"}) == ()
    assert "not in the settings" in state_of(node, job).reason
    with node.database.writing() as connection:
        connection.execute(deliveries.update().values(first_tried_at=deliveries.c.first_tried_at - 3601.0))
    assert rows.give_up_unknown({"out"}) == ()
    assert rows.give_up_unknown({"other"}) == ((job, "dicom-seg"),)
    assert state_of(node, job).state == "dead"


def test_the_waits_double_up_to_the_most() -> None:
    patience = Patience(retry_s=5.0, most_retry_s=300.0, give_up_s=1.0)
    assert [patience.wait_s(n) for n in (0, 1, 2, 3, 7, 8, 10_000)] == [0, 5, 10, 20, 300, 300, 300]
    assert [patience.wait_s(n, first_s=60.0) for n in (1, 2, 4)] == [60, 120, 300]
    # a first wait beyond the most stays
    assert replace(patience, most_retry_s=1.0).wait_s(3, first_s=60.0) == 60
