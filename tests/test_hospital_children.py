"""The process that infers as its worker sees it: every way in which it may end, told apart, and none that harms."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hospital_peers import wait_for

from medseg_pipelines.hospital.children import Children, Outcome, StartError
from medseg_pipelines.hospital.request import Request, read_request

FAKE = str(Path(__file__).with_name("hospital_fake_child.py"))
Ask = Callable[..., Outcome]


def request(folder: Path, how: str, job: str = "1" * 32) -> Request:
    """For a process that behaves so."""
    return Request(
        job=job,
        series_id="2" * 32,
        revision=1,
        files=("/somewhere/a.dcm",) * 3,
        work=str(folder / "work"),
        results=str(folder / "results" / job),
        model=how,
        weights_sha256="",
        description_sha256="",
        formats=("nifti",),
        picture=False,
        tta="none",
        precision="32",
        device="cpu",
        resample_tilt=False,
        resample_gaps=False,
    )


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    """Whose limits no test meets that does not mean to."""
    made = children_of(tmp_path)
    yield made
    made.close()


def children_of(folder: Path, *, most_s: float = 60.0, most_memory_gb: float = 8.0, start_s: float = 60.0) -> Children:
    """Fake ones."""
    (folder / "results").mkdir(exist_ok=True)
    command = (sys.executable, FAKE, str(folder))
    output = folder / "work" / "printed.txt"
    return Children(output, most_s=most_s, most_memory_gb=most_memory_gb, command=command, start_s=start_s)


def ask(children: Children, wanted: Request) -> Outcome:
    """The outcome, whatever the steps."""
    return children.ask(wanted, step=lambda name: None)


def test_a_request_is_the_same_after_its_way_through_the_pipe(tmp_path: Path) -> None:
    wanted = request(tmp_path, "done")
    assert wanted.line().endswith("\n")
    assert wanted.line().count("\n") == 1
    assert read_request(wanted.line()) == wanted
    with pytest.raises(ValueError, match="other keys"):
        read_request('{"job": "1"}')


def test_steps_and_result_are_told_and_the_process_stays(tmp_path: Path, children: Children) -> None:
    steps: list[str] = []
    outcome = children.ask(request(tmp_path, "done"), step=steps.append)
    first = children.process_id
    assert (outcome.end, steps, outcome.result["files"]["nifti"]["file"]) == (
        "done",
        ["checked", "inferred"],
        "nifti.nii.gz",
    )
    again = ask(children, request(tmp_path, "done", "3" * 32))
    assert (again.end, children.process_id) == ("done", first)


def test_a_request_longer_than_a_pipe_gets_through(tmp_path: Path, children: Children) -> None:
    long = request(tmp_path, "done")
    long = read_request(long.line().replace('["/somewhere/a.dcm"', '["' + "x" * 300_000 + '"'))
    assert ask(children, long).end == "done"


@pytest.mark.parametrize(
    ("how", "end", "words"),
    [
        ("refuse", "refused", "no single volume"),
        ("fail", "failed", "the device is in a bad mood"),
        ("segv", "failed", "broke down: it ended by SIGSEGV"),
        ("killed", "failed", "broke down: it was killed (SIGKILL), by the kernel most likely"),
        ("exit", "failed", "broke down: it ended with code 3"),
        ("half", "failed", "broke down: it ended with code 1"),
        ("garbage", "failed", "broke down: it answered with what is no JSON object"),
        ("list", "failed", "broke down: it answered with what is no JSON object"),
        ("closed", "failed", "broke down: it has closed its output"),
    ],
)
def test_ends_are_told_apart_and_the_next_request_is_done(
    tmp_path: Path, children: Children, how: str, end: str, words: str
) -> None:
    outcome = ask(children, request(tmp_path, how))
    assert outcome.end == end
    assert words in outcome.reason
    assert ask(children, request(tmp_path, "done")).end == "done"


def test_who_takes_too_long_is_ended(tmp_path: Path) -> None:
    children = children_of(tmp_path, most_s=0.3)
    children.start()
    process = psutil.Process(children.process_id)
    outcome = ask(children, request(tmp_path, "hang"))
    assert outcome.end == "failed"
    assert "it took more than 0.3 s" in outcome.reason
    assert not process.is_running()


def test_an_answer_for_another_job_is_none(tmp_path: Path) -> None:
    outcome = ask(children_of(tmp_path, most_s=0.3), request(tmp_path, "another"))
    assert outcome.end == "failed"
    assert "it took more than 0.3 s" in outcome.reason


@pytest.mark.parametrize("how", ["eat", "feed"])
def test_who_takes_too_much_memory_is_ended_with_all_that_it_started(tmp_path: Path, how: str) -> None:
    children = children_of(tmp_path, most_memory_gb=0.2)
    children.start()
    process = psutil.Process(children.process_id)
    outcome = ask(children, request(tmp_path, how))
    assert outcome.end == "failed"
    assert "GB of memory, more than the 0.2 GB" in outcome.reason
    assert not process.is_running()
    if how == "feed":
        # whoever is its parent now has to ask for its exit code
        wait_for(lambda: has_ended(int((tmp_path / "started").read_text())), seconds=5)


def test_nothing_is_left_of_one_that_has_crashed(tmp_path: Path, children: Children) -> None:
    outcome = ask(children, request(tmp_path, "orphan"))
    assert "SIGSEGV" in outcome.reason
    wait_for(lambda: has_ended(int((tmp_path / "started").read_text())), seconds=5)


def has_ended(process: int) -> bool:
    """Whether nothing is left of a process but its number."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_nobody_wants_any_more_is_dropped_at_once(tmp_path: Path, children: Children) -> None:
    steps: list[str] = []
    began = time.monotonic()
    outcome = children.ask(request(tmp_path, "slow"), step=steps.append, dropped=lambda: bool(steps))
    assert (outcome.end, children.process_id) == ("dropped", None)
    # of a request that would have gone on for ten minutes
    assert time.monotonic() - began < 30


def test_one_that_dies_while_it_waits_is_followed_by_another(tmp_path: Path, children: Children) -> None:
    children.start()
    first = children.process_id
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: has_ended(first))
    assert ask(children, request(tmp_path, "done")).end == "done"
    assert children.process_id != first


def test_one_that_cannot_be_started_is_no_failure_of_a_request(tmp_path: Path, children: Children) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(StartError, match=r"ended with code 4.*printed.txt.broken says more"):
        ask(children, request(tmp_path, "done"))
    assert "no such library" in (tmp_path / "work" / "printed.txt.broken").read_text()
    (tmp_path / "broken").unlink()
    assert ask(children, request(tmp_path, "done")).end == "done"


def test_one_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    output = tmp_path / "work" / "printed.txt"
    sleeper = (sys.executable, "-c", "import time; time.sleep(600)")
    children = Children(output, most_s=60, most_memory_gb=8, command=sleeper, start_s=0.1)
    with pytest.raises(StartError, match=r"not ready after 0.1 s"):
        children.start()
    assert children.process_id is None


def test_what_it_logs_is_logged_and_what_libraries_print_is_not(
    tmp_path: Path, children: Children, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert ask(children, request(tmp_path, "log")).end == "done"
        outcome = ask(children, request(tmp_path, "segv"))
    assert "the planes are odd" in caplog.messages
    assert "Canary" not in caplog.text + outcome.reason
    # for a person who may see it
    assert "Canary" in (tmp_path / "work" / "printed.txt.broken").read_text()


def test_what_is_printed_does_not_grow_over_months(tmp_path: Path, children: Children) -> None:
    children.start()
    printed = tmp_path / "work" / "printed.txt"
    printed.write_text("of an earlier request")
    assert ask(children, request(tmp_path, "done")).end == "done"
    assert printed.read_text() == ""


def test_closing_ends_the_process(tmp_path: Path) -> None:
    children = children_of(tmp_path)
    children.start()
    process = psutil.Process(children.process_id)
    children.close()
    assert not process.is_running()
    children.close()
