"""`medseg-hospital jobs` and `replay`: what an operator sees of the queue, and how the dead come back."""

from __future__ import annotations

import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hospital_series import insert_series, new_node, put, row_of, settings_of
from typer.testing import CliRunner, Result

import medseg
from medseg_pipelines.hospital import command
from medseg_pipelines.hospital.command import app
from medseg_pipelines.hospital.database import parts
from medseg_pipelines.hospital.jobs import Order
from medseg_pipelines.hospital.node import Node

SERIES = "5" * 32
REASON = "IM07: a gap of 5.00 mm [found], expected 2.50 mm; send what is missing " + "and so on, " * 20


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """With a dead job, one that waits, and its settings in hospital.yaml."""
    settings = settings_of(tmp_path, "hippocampus")
    (tmp_path / "hospital.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    made = new_node(settings)
    with made.database.writing() as connection:
        insert_series(connection, SERIES)
    order = Order(SERIES, 1, "all", "hippocampus", "", {}, priority=1)
    put(made, order)
    job = made.jobs.claim(made.me)
    assert job is not None
    made.jobs.fail(job.id, made.me, REASON, for_good=True)
    put(made, replace(order, revision=2))
    yield made
    made.close()


def run(folder: Path, *arguments: str) -> Result:
    """The command with the settings of the node."""
    return CliRunner().invoke(app, [*arguments, "-c", str(folder / "hospital.yaml")])


def ids(node: Node) -> tuple[str, str]:
    """Of the dead job, and of the other one."""
    (dead,), (queued,) = node.jobs.listed("dead"), node.jobs.listed("queued")
    return dead.id, queued.id


def test_jobs_are_listed_with_their_reasons(node: Node, tmp_path: Path) -> None:
    dead, queued = ids(node)
    listed = run(tmp_path, "jobs")
    assert listed.exit_code == 0
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert [dead, "dead", "selected", "all", "1"] in [row[:5] for row in rows]
    assert [queued, "queued", "selected", "all", "0"] in rows
    # all of it, and its brackets are no markup
    assert " ".join(listed.stdout.split()).count("and so on,") == 20
    assert "[found]" in listed.stdout
    assert "2 jobs" in listed.stdout


def test_jobs_of_one_state_are_listed(node: Node, tmp_path: Path) -> None:
    dead, queued = ids(node)
    listed = run(tmp_path, "jobs", "--state", "dead").stdout
    assert dead in listed
    assert queued not in listed
    assert run(tmp_path, "jobs", "--state", "lost").exit_code == 2


def test_a_dead_job_is_replayed_and_that_is_on_record(node: Node, tmp_path: Path) -> None:
    dead, _ = ids(node)
    replayed = run(tmp_path, "replay", dead)
    assert (replayed.exit_code, replayed.stdout) == (0, "1 begun again.\n")
    assert row_of(node, dead).state == "queued"
    audits = [path.read_text() for path in (tmp_path / "node" / "audit").glob("*-command-*")]
    assert any('"event": "replay"' in text and dead in text for text in audits)


def test_all_dead_jobs_are_replayed_at_once(node: Node, tmp_path: Path) -> None:
    dead, _ = ids(node)
    assert run(tmp_path, "replay", "--all").exit_code == 0
    assert row_of(node, dead).state == "queued"
    assert run(tmp_path, "replay", "--all").stdout == "0 begun again.\n"


def test_what_cannot_be_replayed_is_said_and_costs_no_other(node: Node, tmp_path: Path) -> None:
    dead, queued = ids(node)
    replayed = run(tmp_path, "replay", queued, dead)
    assert replayed.exit_code == 1
    assert f"{queued}: no dead job, nor are its deliveries" in replayed.output
    assert row_of(node, dead).state == "queued"


@pytest.mark.parametrize("arguments", [[], ["--all", "1" * 32]])
def test_replay_wants_ids_or_all(node: Node, tmp_path: Path, arguments: list[str]) -> None:
    assert isinstance(run(tmp_path, "replay", *arguments).exception, medseg.ConfigError)
    assert len(node.jobs.listed("dead")) == 1


def test_a_part_tells_what_it_fails_of_and_nobodys_name(node: Node, tmp_path: Path) -> None:
    def part(_: Node, stop: threading.Event) -> None:
        raise ValueError("of Canary^Tweety")

    with pytest.raises(medseg.MedsegError, match="web has failed: ValueError at test_hospital_command") as caught:
        command._run_part(tmp_path / "hospital.yaml", "web", 0, part, False)
    assert "Canary" not in "".join(traceback.format_exception(caught.value))


def test_a_thread_of_a_part_tells_nobodys_name(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ValueError("of Canary^Tweety")

    def part(_: Node, stop: threading.Event) -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        warnings.warn("Invalid value for VR PN: Canary^Tweety", stacklevel=1)

    before = threading.excepthook
    try:
        with warnings.catch_warnings():
            command._run_part(tmp_path / "hospital.yaml", "web", 0, part, False)
    finally:
        threading.excepthook = before
    heard = capfd.readouterr()
    assert "a thread has ended: ValueError" in caplog.text + heard.err + heard.out
    assert "Canary" not in caplog.text + heard.err + heard.out


def test_health_is_that_of_the_parts_of_this_machine(node: Node, tmp_path: Path) -> None:
    # of this machine nothing ran yet, as far as anybody can tell
    with node.database.writing() as connection:
        connection.execute(parts.delete())
    assert run(tmp_path, "health").exit_code == 1
    node.beat()
    assert run(tmp_path, "health").exit_code == 0
    with node.database.writing() as connection:
        connection.execute(parts.update().values(seen_at=parts.c.seen_at - 61))
        # another machine's life is not ours
        now = node.database.now(connection)
        other = {"name": "elsewhere-worker-0", "kind": "worker", "started_at": 0.0, "seen_at": now}
        connection.execute(parts.insert().values(other))
    told = run(tmp_path, "health")
    assert told.exit_code == 1
    assert "has given no sign of life" in told.output


def test_without_the_extra_the_command_names_it() -> None:
    blocked = (
        "import sys; sys.modules['sqlalchemy'] = None; from medseg_pipelines.hospital.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", blocked, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    words = " ".join(done.stderr.split())
    assert "pip install '.[hospital]'" in words
    assert "sqlalchemy" in words
    assert "Traceback" not in words
