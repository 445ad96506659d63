"""The command `medseg`: one function per verb that parses, calls the face, prints; no work is done here."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer
from rich.markup import escape

import medseg
from medseg import Preempted
from medseg.cli import conversion, evaluation, inference, networks, processes, training
from medseg.cli.shared import INTERRUPTED, OK, PREEMPTED, SOME_FAILED, USAGE, new_app
from medseg.terminal import err, out, show_any_name

# the one verb whose processes work together, and which a cluster may end and start again
TRAIN = ["train"]
ENDINGS = {
    PREEMPTED: "told to end; the same command line goes on from here",
    INTERRUPTED: "interrupted; what was finished is valid",
}

app = new_app(
    "medseg",
    help="Medical image segmentation: from a folder of scans to masks and a Dice report.",
    no_args_is_help=True,
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"medseg {medseg.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Medical image segmentation: from a folder of scans to masks and a Dice report."""


# in the order of the help, each with the example that its own help ends with
_VERBS = (
    (training.demo, "medseg demo -o demo"),
    (training.check, "medseg check my_data/"),
    (training.plan, "medseg plan my_data/ -o plan.yaml"),
    (training.train, "medseg train my_data/ -o runs/first --time-budget 20m"),
    (inference.infer, "medseg infer scans/ -m runs/first -o masks/ --tta flip"),
    (evaluation.evaluate, "medseg evaluate masks/ my_data/labelsTr -o report/ --labels runs/first"),
    (evaluation.compare, "medseg compare ours=runs/a/report theirs=runs/b/report -o comparison/"),
    (conversion.convert, "medseg convert mask.nii.gz --source dicom/ -o seg.dcm"),
    (conversion.deidentify, "medseg deidentify dicom/ -o research/ --keep-interval --salt-file project.salt"),
    (networks.inspect, "medseg inspect deeplabv3plus --spatial-dims 2 --patch 256,256 --png network.png"),
    (networks.models, "medseg models"),
    (networks.export, "medseg export hippocampus -o hippocampus.onnx --to onnx"),
)
for _verb, _example in _VERBS:
    app.command(epilog=f"Example: {_example}")(_verb)


def main() -> None:
    """Run the command line and exit with the code that the outcome deserves."""
    # to be told to end is an interruption from the first moment on; whoever ignores it (nohup) has a reason
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == usual:
            signal.signal(number, _end)
    show_any_name()
    code = run(sys.argv[1:])
    out.settle()
    err.settle()
    if code and sys.argv[1:2] == TRAIN and processes.is_one_of_several():
        # to take leave of processes that wait for this one could take for ever
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """The exit code of a command line. A user's mistake is one message; its traceback is shown with -v."""
    try:
        app(arguments, prog_name="medseg", obj=arguments)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else USAGE
        if code == PREEMPTED:
            # of the processes that this one started
            return _told(arguments, code)
        return _interrupted(arguments, done) if code == INTERRUPTED else code
    except KeyboardInterrupt as told:
        return _interrupted(arguments, told)
    except medseg.CasesError as error:
        logging.getLogger("medseg").debug("traceback", exc_info=True)
        for line in error.failed:
            err.print(f"[red]failed:[/red] {escape(line)}")
        return SOME_FAILED
    except medseg.MedsegError as error:
        logging.getLogger("medseg").debug("traceback", exc_info=True)
        rank = _rank(arguments)
        # of other starters' processes each may be on a machine of its own, with mistakes of its own
        shared = isinstance(error, medseg.ConfigError) and processes.has_a_starter()
        told_by_others = shared or isinstance(error, medseg.PeerError)
        if not (rank and told_by_others):
            which = f"process {rank}: " if rank else ""
            err.print(f"[red]error:[/red] {which}{escape(str(error))}")
        return SOME_FAILED if isinstance(error, medseg.TrainingError) else USAGE
    except OSError as error:
        # a disk that is full or away, a folder that is closed; whatever is whole is gone on from
        logging.getLogger("medseg").debug("traceback", exc_info=True)
        where = "a file" if error.filename is None else error.filename
        which = f"process {rank}: " if (rank := _rank(arguments)) else ""
        err.print(f"[red]error:[/red] {which}{escape(f'{where}: {error.strerror or error}')}; see to it and try again")
        return SOME_FAILED
    except Exception:
        if arguments[:1] != TRAIN or not processes.is_one_of_several():
            raise
        # a defect, told as Python would: but its own way out waits for the other processes
        traceback.print_exc()
        return SOME_FAILED
    return OK


def _end(number: int, frame: FrameType | None) -> None:
    """A signal becomes a `KeyboardInterrupt`, but for imports: C++ aborts the process or reports an import twice."""
    arguments = sys.argv[1:]
    asked = Preempted() if number == signal.SIGTERM else KeyboardInterrupt()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # nothing that is worth waiting for is under way
            os._exit(_interrupted(arguments, asked))
        frame = frame.f_back
    raise asked


def _rank(arguments: list[str]) -> int:
    """The number of this process, where processes work together; of other verbs each is for itself."""
    return processes.rank() if arguments[:1] == TRAIN else 0


def _interrupted(arguments: list[str], error: BaseException | None) -> int:
    """The exit code of work that a signal ended. `error`: what the signal raised, or what came of it."""
    while error is not None and not isinstance(error, Preempted):
        error = error.__cause__ or error.__context__
    return _told(arguments, INTERRUPTED if error is None or arguments[:1] != TRAIN else PREEMPTED)


def _told(arguments: list[str], code: int) -> int:
    """Say, once for all processes, that a signal ended the work; the code that was given."""
    if not _rank(arguments) and not processes.has_a_starter():
        err.print(ENDINGS[code])
    return code
