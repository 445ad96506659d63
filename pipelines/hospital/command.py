"""The command `medseg-hospital`: all parts of a node on one machine, or one part of it alone."""

from __future__ import annotations

import getpass
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import medseg
from medseg.cli.shared import OK, USAGE, Verbose, finish, new_app
from medseg.cli.shared import log as log_to_terminal
from medseg.terminal import err, out
from medseg_pipelines.hospital.database import DatabaseDownError
from medseg_pipelines.hospital.models import Models, model_of
from medseg_pipelines.hospital.node import Node, database_of, machine_of, open_node, queue_of
from medseg_pipelines.hospital.settings import NodeSettings, read_settings
from medseg_pipelines.hospital.supervisor import Part, end_with_supervisor, supervise
from medseg_pipelines.hospital.threads import told

log = logging.getLogger("medseg.hospital")


class State(str, Enum):
    """What a job may be."""

    queued = "queued"
    running = "running"
    done = "done"
    dead = "dead"
    superseded = "superseded"


app = new_app("medseg-hospital")
Config = Annotated[
    Path, typer.Option("-c", "--config", metavar="FILE.yaml", help="Settings, as configs/hospital.yaml.")
]
Number = Annotated[int, typer.Option("--number", min=0, help="Which one of this kind on this machine.")]


@app.command(epilog="Example: medseg-hospital run -c configs/hospital.yaml")
def run(config: Config, verbose: Verbose = False) -> None:
    """Start gateway, workers and pages on this machine; a part that ends is started again."""
    _log(verbose)
    settings = read_settings(config)
    # what no part could work with is told once, here
    models = Models()
    for rule in settings.rules:
        model_of(models, rule)
    try:
        database_of(settings).close()
    except DatabaseDownError as error:
        # after a power cut it may be up later than this
        log.error("%s; the parts are started, and try again", error)
    options = ["-c", str(config)] + (["-v"] if verbose else [])
    workers = [Part(f"worker {n}", ("worker", "--number", str(n), *options)) for n in range(settings.worker.workers)]
    parts = [Part("gateway", ("gateway", *options)), *workers, Part("web", ("web", *options))]
    with stopping() as stop:
        supervise(parts, stop)
    out.print("All parts have ended.")


@app.command(epilog="Example: medseg-hospital gateway -c configs/hospital.yaml")
def gateway(config: Config, verbose: Verbose = False) -> None:
    """Receive DICOM (C-STORE, folders, pulls) and queue what the rules take."""
    from medseg_pipelines.hospital.gateway import run_gateway

    _run_part(config, "gateway", 0, run_gateway, verbose)


@app.command(epilog="Example: medseg-hospital worker -c configs/hospital.yaml --number 1")
def worker(config: Config, number: Number = 0, verbose: Verbose = False) -> None:
    """Segment what is queued and send the results."""
    from medseg_pipelines.hospital.worker import run_worker

    _run_part(config, "worker", number, run_worker, verbose)


@app.command(epilog="Example: medseg-hospital web -c configs/hospital.yaml")
def web(config: Config, verbose: Verbose = False) -> None:
    """Serve the pages, /livez, /readyz and /metrics."""
    from medseg_pipelines.hospital.web import run_web

    _run_part(config, "web", 0, run_web, verbose)


@app.command(epilog="Example: medseg-hospital password")
def password() -> None:
    """Print what stands in the settings for a user's password, which is asked for, or read from standard input."""
    from medseg_pipelines.hospital.web_login import hash_password

    if sys.stdin.isatty():
        typed = getpass.getpass("Password: ")
        if getpass.getpass("Once more: ") != typed:
            raise medseg.ConfigError("password: the two are not the same; try again")
    else:
        typed = sys.stdin.readline().rstrip("\r\n")
    out.print(hash_password(typed), markup=False)


@app.command(epilog="Example: medseg-hospital jobs -c configs/hospital.yaml --state dead")
def jobs(
    config: Config,
    state: Annotated[State | None, typer.Option(help="Only those in this state.", case_sensitive=False)] = None,
    verbose: Verbose = False,
) -> None:
    """List jobs with state, step, rule, attempts and, where they failed, the reason."""
    _log(verbose)
    settings = read_settings(config)
    database = database_of(settings)
    try:
        listed = queue_of(settings, database).listed(state.value if state else None)
    finally:
        database.close()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "state", "step", "rule"):
        table.add_column(name, no_wrap=True)
    table.add_column("attempts", justify="right")
    table.add_column("reason", overflow="fold")
    for job in listed:
        table.add_row(job.id, job.state, job.step, job.rule, str(job.attempts), escape(job.reason))
    # a table that is cut to 80 columns cannot be read: lines may run on
    Console(highlight=False, emoji=False, width=max(out.width, 132), soft_wrap=True).print(table)
    out.print(f"{len(listed)} jobs", markup=False)


@app.command(epilog="Example: medseg-hospital replay -c configs/hospital.yaml --all")
def replay(
    config: Config,
    job: Annotated[list[str] | None, typer.Argument(metavar="JOB...", help="Ids, as `jobs` lists them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All that are dead, or have deliveries that are.")] = False,
    verbose: Verbose = False,
) -> None:
    """Begin again what was given up: dead jobs, and dead deliveries of jobs that are done."""
    from medseg_pipelines.hospital.replaying import dead_jobs, replay_job

    _log(verbose)
    if bool(job) == every:
        raise medseg.ConfigError("expected ids of jobs, or --all")
    node = open_node(read_settings(config), "command", os.getpid())
    try:
        asked = dead_jobs(node.database) if every else job or []
        vain = [f"{one}: no dead job, nor are its deliveries" for one in asked if not replay_job(node, one, user=None)]
    finally:
        node.close()
    finish(f"{len(asked) - len(vain)} begun again.", vain)


@app.command(epilog="Example: medseg-hospital health -c configs/hospital.yaml")
def health(config: Config, verbose: Verbose = False) -> None:
    """Exit with 0 where the parts that run on this machine have lately given a sign of life, else with 1."""
    from medseg_pipelines.hospital.operations import silent_parts

    _log(verbose)
    settings = read_settings(config)
    database = database_of(settings)
    try:
        silent = silent_parts(database, machine_of(settings))
    finally:
        database.close()
    line = "Not all parts live." if silent else "All parts live."
    finish(line, [f"{kind} has given no sign of life" for kind in silent])


@app.command(epilog="Example: medseg-hospital audit -c configs/hospital.yaml")
def audit(
    config: Config,
    holds: Annotated[
        list[str] | None,
        typer.Option("--holds", metavar="HASH", help="Printed earlier; must still be there. Repeatable."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Follow the chains of the audit log; exits with 1 where one is broken, or a file is missing."""
    from medseg_pipelines.hospital.audit import check_audit

    _log(verbose)
    found = check_audit(read_settings(config).folder / "audit")
    faults = list(found.faults)
    faults += [f"no line has the hash {sha256}, which was here" for sha256 in holds or () if not found.holds(sha256)]
    for file in found.files:
        if not file.ended:
            cut = "breaks off inside its last line" if file.torn else "has no end"
            out.print(f"{file.path.name}: {cut}: its process still runs, was killed, or the file was cut", markup=False)
    for part, sha256 in found.heads.items():
        out.print(f"{part} ends with {sha256}", markup=False)
    finish(f"{len(found.files)} files, {sum(len(file.hashes) for file in found.files)} lines.", faults)


def _run_part(
    config: Path, kind: str, number: int, part: Callable[[Node, threading.Event], None], verbose: bool
) -> None:
    end_with_supervisor()
    _log(verbose)
    settings: NodeSettings = read_settings(config)
    _keep_to_itself()
    node = open_node(settings, kind, number)
    try:
        with stopping() as stop:
            part(node, stop)
    except medseg.MedsegError:
        raise
    except Exception as error:  # noqa: BLE001
        # its own words may quote a patient's data
        raise medseg.MedsegError(f"{kind} has failed: {told(error)}; it is to be started again") from None
    finally:
        node.close()


def _keep_to_itself() -> None:
    """Nothing of a patient leaves the process by what Python and the kernel write down of it; nor its child."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # pydicom's quote the values that they are about
    warnings.simplefilter("ignore")
    threading.excepthook = _tell_of_thread


def _tell_of_thread(failure: threading.ExceptHookArgs) -> None:
    error = failure.exc_value
    log.error("a thread has ended: %s", told(error) if error is not None else failure.exc_type.__name__)


class stopping:  # noqa: N801
    """A context: the event that SIGTERM and SIGINT set."""

    def __enter__(self) -> threading.Event:
        self._event = threading.Event()

        def hear(*_: object) -> None:
            # not here: the signal may come while this very thread holds the lock inside the event
            threading.Thread(target=self._event.set, daemon=True).start()

        self._before = {s: signal.signal(s, hear) for s in (signal.SIGTERM, signal.SIGINT)}
        return self._event

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command line and exit with the code that the outcome deserves."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """The exit code of a command line. A user's mistake is one message; its traceback is shown with -v."""
    try:
        app(arguments, prog_name="medseg-hospital")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else USAGE
    except medseg.MedsegError as error:
        log.debug("traceback", exc_info=True)
        err.print(f"[red]error:[/red] {escape(str(error))}")
        return USAGE
    return OK


def _log(verbose: bool) -> None:
    """What the node logs goes where the library's words go."""
    log_to_terminal(verbose)
    theirs, ours = logging.getLogger("medseg"), logging.getLogger("medseg_pipelines")
    ours.handlers = list(theirs.handlers)
    ours.setLevel(theirs.level)
