"""The durable queue on SQLite and on PostgreSQL: many processes at once, leases, back-off, losses, replay."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hospital_peers import postgres, postgres_server, wait_for  # noqa: F401
from hospital_series import insert_instance, insert_series

from medseg_pipelines.hospital.database import Database, deliveries, jobs, open_database
from medseg_pipelines.hospital.jobs import MOST_LOSSES, Job, Jobs, Order, Worker

ME, AFTER_RESTART, OTHER = Worker("a-worker-0", "1" * 32), Worker("a-worker-0", "3" * 32), Worker("b", "2" * 32)
LEASE_S, RETRY_S = 60.0, 10.0
SERIES = "5" * 32
ORDER = Order(SERIES, 1, "rule", "model", "f" * 64, {"tta": "none", "formats": ["nifti"]})


class Clock:
    """The clock of a database, which only moves when it is told to."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self, _: sa.Connection) -> float:
        return self.at


class Bench:
    """A queue with its database and clock."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.jobs = Jobs(database, attempts=3, retry_s=RETRY_S, lease_s=LEASE_S)
        self.clock = Clock()
        with database.writing() as connection:
            insert_series(connection, SERIES)

    def put(self, number: int = 1, **changes: Any) -> str:
        """Queues a job, the `number`-th revision of the series; a second passes."""
        self.clock.at += 1
        order = replace(ORDER, revision=number, **changes)
        with self.database.writing() as connection:
            assert self.jobs.put(connection, order)
        return order.id

    def row(self, job_id: str) -> Any:
        """What is written of a job."""
        with self.database.reading() as connection:
            return connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()

    def claim(self, worker: Worker = ME) -> Job:
        """A job that must be there."""
        job = self.jobs.claim(worker)
        assert job is not None
        return job

    def held(self) -> Job:
        """A new job, claimed."""
        self.put()
        return self.claim()

    def sends(self) -> list[tuple[str, str, str]]:
        """Destination, format and state of all deliveries."""
        with self.database.reading() as connection:
            found = sa.select(deliveries.c.destination, deliveries.c.format, deliveries.c.state)
            return sorted(connection.execute(found).tuples().all())


@pytest.fixture(params=["sqlite", "postgres"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """A queue by the clock of its database."""
    url = request.getfixturevalue("postgres") if request.param == "postgres" else None
    database = open_database(url, tmp_path)
    yield Bench(database)
    database.close()


@pytest.fixture
def bench(real: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A queue whose clock stands still."""
    monkeypatch.setattr(real.database, "now", real.clock)
    return real


def test_two_processes_that_claim_at_once_never_get_one_job_twice(real: Bench) -> None:
    wanted = sorted(real.put(number) for number in range(1, 61))
    url = real.database.url.render_as_string(hide_password=False)
    script = str(Path(__file__).with_name("hospital_claimer.py"))
    claimers = [
        subprocess.Popen(
            # SQLite is not fair: one that had no bound could have them all
            [sys.executable, script, url, name, "40"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for claimer in claimers:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "ready\n"
    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("\n")
        claimer.stdin.flush()
    got = [json.loads(claimer.communicate(timeout=60)[0]) for claimer in claimers]
    assert sorted(got[0] + got[1]) == wanted
    assert min(map(len, got)) >= 20


def test_the_greatest_priority_goes_first_and_of_those_the_oldest(bench: Bench) -> None:
    wanted = {}
    for number, priority in enumerate((0, 5, 5, -3, 0), 1):
        wanted[number] = bench.put(number, priority=priority)
    claimed = [bench.claim().id for _ in wanted]
    assert claimed == [wanted[n] for n in (2, 3, 1, 5, 4)]
    assert bench.jobs.claim(ME) is None


def test_a_job_is_put_once_whatever_the_order_of_its_settings(bench: Bench) -> None:
    bench.put()
    again = replace(ORDER, settings={"formats": ["nifti"], "tta": "none"}, rule="of another name", priority=9)
    with bench.database.writing() as connection:
        assert not bench.jobs.put(connection, again)
        for other in (
            replace(ORDER, revision=2),
            replace(ORDER, model_sha256="e" * 64),
            replace(ORDER, settings={"tta": "flip", "formats": ["nifti"]}),
        ):
            assert bench.jobs.put(connection, other)


def test_a_claimed_job_has_the_files_of_its_revision_and_no_copies(bench: Bench) -> None:
    with bench.database.writing() as connection:
        rows: tuple[dict[str, Any], ...] = ({"revision": 1}, {"revision": 2}, {"revision": 3}, {"is_copy": True})
        for n, changes in enumerate(rows):
            insert_instance(connection, f"{n}" * 32, SERIES, f"store/{n}.dcm", **changes)
        insert_instance(connection, "a" * 32, SERIES, "store/a.dcm", revision=None)
    bench.put(2)
    job = bench.claim()
    assert (job.files, job.revision, job.order) == (("store/0.dcm", "store/1.dcm"), 2, dict(ORDER.settings))


def test_a_failed_job_waits_longer_each_time_and_is_dead_after_its_last_go(bench: Bench) -> None:
    job_id = bench.put()
    for wait_s in (RETRY_S, 2 * RETRY_S):
        job = bench.claim()
        assert bench.jobs.fail(job.id, ME, "broke", for_good=False) == "queued"
        bench.clock.at += wait_s - 0.001
        assert bench.jobs.claim(ME) is None
        bench.clock.at += 0.001
    job = bench.claim()
    assert (job.attempts, bench.jobs.fail(job.id, ME, "broke again", for_good=False)) == (3, "dead")
    row = bench.row(job_id)
    assert (row.state, row.reason, row.finished_at) == ("dead", "broke again", bench.clock.at)
    bench.clock.at += 1e6
    assert bench.jobs.claim(ME) is None
    assert bench.jobs.release_expired() == ()


def test_what_is_of_no_use_to_try_again_is_dead_at_once_and_costs_no_other(bench: Bench) -> None:
    first, second = bench.put(1), bench.put(2)
    job = bench.claim()
    assert bench.jobs.fail(job.id, ME, "no volume", for_good=True) == "dead"
    other = bench.claim()
    assert {job.id, other.id} == {first, second}


def test_a_lease_that_is_renewed_holds_and_one_that_is_not_ends(bench: Bench) -> None:
    job = bench.held()
    for _ in range(3):
        bench.clock.at += LEASE_S - 1
        assert bench.jobs.release_expired() == ()
        assert bench.jobs.renew(job.id, ME)
    bench.clock.at += LEASE_S + 1
    (released,) = bench.jobs.release_expired()
    assert (released.job_id, released.state) == (job.id, "queued")
    # no failure of the job: this go is its first one again
    again = bench.claim(OTHER)
    assert (again.id, again.attempts, bench.row(job.id).losses) == (job.id, 1, 1)


def test_a_worker_that_lost_its_job_can_change_nothing_of_it(bench: Bench) -> None:
    job = bench.held()
    bench.clock.at += LEASE_S + 1
    bench.jobs.release_expired()
    for state in ("queued", "running"):
        assert bench.row(job.id).state == state
        before = bench.row(job.id)
        assert not bench.jobs.renew(job.id, ME)
        assert not bench.jobs.advance(job.id, ME, "inferred")
        assert not bench.jobs.finish(job.id, ME, {}, [("out", "nifti")])
        assert not bench.jobs.hand_back(job.id, ME)
        assert bench.jobs.fail(job.id, ME, "late", for_good=True) == "lost"
        assert bench.row(job.id) == before
        assert bench.sends() == []
        bench.jobs.claim(OTHER)


def test_a_job_that_its_workers_never_survive_is_dead_with_that_reason(bench: Bench) -> None:
    job_id = bench.put()
    for loss in range(1, MOST_LOSSES + 1):
        bench.claim()
        bench.clock.at += LEASE_S + 1
        (released,) = bench.jobs.release_expired()
        assert released.state == ("dead" if loss == MOST_LOSSES else "queued")
    assert "its worker was gone 5 times" in bench.row(job_id).reason == released.reason
    assert bench.jobs.claim(ME) is None


def test_a_worker_gives_back_what_it_held_before_its_restart_and_nothing_else(bench: Bench) -> None:
    mine, others = bench.put(1), bench.put(2)
    bench.put(3)
    assert [bench.claim(w).id for w in (ME, OTHER)] == [mine, others]
    now = bench.claim(AFTER_RESTART)
    (released,) = bench.jobs.give_back(AFTER_RESTART.name, but=AFTER_RESTART.token)
    assert released.job_id == mine
    assert [bench.row(job_id).state for job_id in (mine, others, now.id)] == ["queued", "running", "running"]


def test_a_job_that_is_handed_back_is_as_if_it_had_not_begun(bench: Bench) -> None:
    job = bench.held()
    bench.jobs.advance(job.id, ME, "checked")
    assert bench.jobs.hand_back(job.id, ME)
    row = bench.row(job.id)
    assert (row.state, row.step, row.attempts, row.losses) == ("queued", "selected", 0, 0)
    assert bench.claim(OTHER).id == job.id


def test_steps_are_told_and_begin_anew_with_each_go(bench: Bench) -> None:
    job = bench.held()
    assert bench.jobs.advance(job.id, ME, "inferred")
    assert bench.row(job.id).step == "inferred"
    bench.jobs.fail(job.id, ME, "broke", for_good=False)
    bench.clock.at += RETRY_S
    assert bench.claim().step == "selected"


def test_what_is_finished_is_sent_once_to_each_destination_in_each_format(bench: Bench) -> None:
    job = bench.held()
    sends = [("pacs", "dicom-seg"), ("pacs", "rtstruct"), ("disk", "dicom-seg")]
    with bench.database.writing() as connection:
        # a delivery of an earlier life of the job
        done = {"state": "done", "attempts": 1, "not_before": 0.0, "reason": ""}
        connection.execute(deliveries.insert().values(job_id=job.id, destination="pacs", format="dicom-seg", **done))
    assert bench.jobs.finish(job.id, ME, {"files": {}}, sends)
    assert bench.sends() == [
        ("disk", "dicom-seg", "waiting"),
        ("pacs", "dicom-seg", "done"),
        ("pacs", "rtstruct", "waiting"),
    ]
    row = bench.row(job.id)
    assert (row.state, row.step, row.result) == ("done", "encoded", {"files": {}})


def test_what_goes_nowhere_is_through_when_it_is_finished(bench: Bench) -> None:
    job = bench.held()
    assert bench.jobs.finish(job.id, ME, {}, [])
    assert bench.row(job.id).step == "confirmed"


def test_only_dead_jobs_are_replayed_and_with_all_their_goes(bench: Bench) -> None:
    dead, queued = bench.put(1), bench.put(2)
    bench.jobs.fail(bench.claim().id, ME, "no volume", for_good=True)
    assert [bench.jobs.replay(job_id) for job_id in (dead, queued, "no such job")] == [True, False, False]
    row = bench.row(dead)
    assert (row.state, row.attempts, row.losses, row.reason, row.finished_at) == ("queued", 0, 0, "", None)
    assert bench.claim().attempts == 1


def test_jobs_are_listed_newest_first_by_state(bench: Bench) -> None:
    first = bench.put(1)
    second = bench.put(2)
    bench.jobs.fail(bench.claim().id, ME, "no volume", for_good=True)
    assert [job.id for job in bench.jobs.listed()] == [second, first]
    (dead,) = bench.jobs.listed("dead")
    assert (dead.id, dead.attempts, dead.reason, dead.rule) == (first, 1, "no volume", "rule")


def test_leases_are_judged_by_the_database_s_clock_where_machines_share_it(
    postgres: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(open_database(postgres, tmp_path))
    job = bench.held()
    real_time = time.time
    for ahead_s in (1e6, -1e6):
        monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: real_time() + ahead_s)
        assert bench.jobs.release_expired() == ()
        assert bench.jobs.renew(job.id, ME)
    bench.database.close()


def test_rows_of_who_stands_still_in_a_transaction_are_free_after_a_while(
    postgres: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(open_database(postgres, tmp_path))
    job_id = bench.put(1)
    monkeypatch.setattr("medseg_pipelines.hospital.database.SILENT_S", 1.0)

    def stand() -> None:
        with bench.database.writing() as standing:
            standing.execute(jobs.update().values(reason="half done"))
            assert bench.jobs.claim(ME) is None
            wait_for(lambda: (found := bench.jobs.claim(ME)) is not None and found.id == job_id)
            standing.execute(jobs.update().values(reason="done"))

    # the server has closed what the transaction was in
    with pytest.raises(sa.exc.DBAPIError):
        stand()
    (job,) = bench.jobs.listed()
    assert (job.state, job.reason) == ("running", "")
    bench.database.close()
