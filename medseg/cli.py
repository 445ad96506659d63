"""The command `medseg`: one function per verb that parses, calls the face, prints; no work is done here."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections import Counter
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape

import medseg
from medseg.terminal import err, network_line, out, print_network, shown_progress

OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# a mask of which less is expected wants a look; of more lines than these nobody reads any
LOW_DICE, MOST_LINES = 0.7, 10

app = typer.Typer(
    name="medseg",
    help="Medical image segmentation: from a folder of scans to masks and a Dice report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # plain help: the framed one cuts off names of options at 80 columns
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AnyDevice = Annotated[str, typer.Option(help="As for the other verbs; this one needs no GPU and works on the CPU.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")]
DatasetArg = Annotated[
    Path, typer.Argument(metavar="DATASET", help="nnU-Net or Decathlon folder, images/ + labels/, or a CSV/JSON list.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; repeatable.")
]


class Precision(str, Enum):
    """Number formats of `--precision`."""

    auto = "auto"
    full = "32"
    bf16 = "bf16"


class Tta(str, Enum):
    """Test-time augmentations of `--tta`."""

    none = "none"
    flip = "flip"
    scale = "scale"
    auto = "auto"


class Engine(str, Enum):
    """What runs the network, of `--engine`."""

    torch = "torch"
    compile = "compile"
    openvino = "openvino"


class Surface(str, Enum):
    """Definitions of a surface for `--surface`."""

    surfel = "surfel"
    voxel = "voxel"


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


@app.command(epilog="Example: medseg demo -o demo")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for everything.")] = Path(
        "demo"
    ),
    time_budget: Annotated[str, typer.Option(help="Time of the training loop, such as 90s or 3m.")] = "3m",
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Train on the sample data (hippocampus MR), segment held-back cases, write a Dice report."""
    _log(verbose)
    with shown_progress() as progress:
        result = medseg.demo(output, time_budget=time_budget, device=device, progress=progress)
    _print_report(result.report)
    _finish(f"Report: {result.folder / 'report.html'}", _failed(result.results, result.report))


@app.command(epilog="Example: medseg check my_data/")
def check(dataset: DatasetArg, device: AnyDevice = "auto", verbose: Verbose = False) -> None:
    """Look at every file before any work: geometry, labels, ranges, pairs, duplicates."""
    _log(verbose)
    with shown_progress() as progress:
        findings = medseg.check_dataset(dataset, progress=progress)
    for finding in findings.findings:
        style = {"error": "red", "warning": "yellow"}.get(finding.severity, "dim")
        place = escape(finding.file or finding.case or str(dataset))
        out.print(f"[{style}]{finding.severity}[/{style}] {place}: {escape(finding.found)}", end="")
        out.print(f"; expected {escape(finding.expected)}; {escape(finding.fix)}")
    errors, others = len(findings.errors), len(findings.findings) - len(findings.errors)
    _finish(
        f"{dataset}: {len(findings.facts)} cases read, {errors} errors, {others} other findings",
        [],
        errors > 0,
    )


@app.command(epilog="Example: medseg plan my_data/ -o plan.yaml")
def plan(
    dataset: DatasetArg,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.yaml", help="Where to; left out: printed.")
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Measure a data set and write the full configuration that `train` would use, with a reason beside each choice."""
    _log(verbose)
    with shown_progress() as progress:
        made = medseg.plan(dataset, settings=_settings(settings), device=device, progress=progress)
    text = medseg.dump_yaml(made.config, made.reasons)
    if output is None:
        out.print(text, markup=False)
        return
    medseg.write_text(output, text)
    _finish(f"Plan: {output}")


@app.command(epilog="Example: medseg train my_data/ -o runs/first --time-budget 20m")
def train(
    dataset: DatasetArg,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder to write.")],
    config: Annotated[
        Path | None, typer.Option("-c", "--config", metavar="FILE.yaml", help="Settings; left out: planned.")
    ] = None,
    settings: Settings = None,
    fold: Annotated[str, typer.Option(metavar="K|all", help="Fold held back for validation; all: none.")] = "0",
    folds: Annotated[int, typer.Option(help="Number of folds, where the data set has none of its own.", min=2)] = 5,
    time_budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time of the training loop: 90s, 20m, 1.5h.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of a time budget.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in RUN.")] = False,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|RUN", help="Weights to begin with, where they fit: of medseg, MONAI, MedicalNet, torchvision."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.", min=0)] = None,
    precision: Annotated[Precision, typer.Option(help="auto: bf16 where the hardware has it.")] = Precision.auto,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same seed, same weights, bit for bit.")
    ] = False,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Plan, preprocess, train and validate at full resolution."""
    _log(verbose)
    chosen: dict[str, Any] = {"precision": precision.value} if precision is not Precision.auto else {}
    chosen |= {"seed": seed} if seed is not None else {}
    chosen |= {"deterministic": True} if deterministic else {}
    options = medseg.TrainOptions(
        config=config,
        settings=_settings(settings, {"train": chosen} if chosen else {}),
        fold=_fold(fold),
        folds=folds,
        device=device,
        resume=resume,
        pretrained=pretrained,
    )
    with shown_progress() as progress:
        run = medseg.train(dataset, output, time_budget=time_budget, epochs=epochs, options=options, progress=progress)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items())
    if run.pretrained is not None:
        out.print(escape(run.pretrained.summary()))
    out.print(f"{run.steps} steps; {spent}")
    if run.report is not None:
        _print_report(run.report)
    _finish(f"Model: {run.folder}", _failed(run.results, run.report))


@app.command(epilog="Example: medseg infer scans/ -m runs/first -o masks/ --tta flip")
def infer(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Files or folders: NIfTI, NRRD, MHA, PNG, TIFF.")
    ],
    model: Annotated[
        list[Path], typer.Option("-m", "--model", metavar="RUN", help="Run folder; several -m: an ensemble.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for masks and run.json.")],
    window: Annotated[
        str,
        typer.Option(
            metavar="auto|whole|Z,Y,X",
            help="How an image is cut for the network. auto: what was fastest at the best Dice when training ended; "
            "whole: not at all; numbers: voxels of the network's grid (the spacing that the model works in), slowest "
            "axis first; of pictures rows,columns.",
        ),
    ] = "auto",
    tta: Annotated[
        Tta,
        typer.Option(
            help="Average over copies of the image. flip: mirrored; scale: of other sizes as well; auto: those that "
            "helped when training ended. Each copy costs as much as the image."
        ),
    ] = Tta.none,
    overlap: Annotated[
        float | None,
        typer.Option(help="Share of a window that its neighbour covers too, 0 to below 1; left out: the model's own."),
    ] = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="i/n",
            help="Do every n-th case only, beginning with the i-th; all shards may run at once and into one folder.",
        ),
    ] = "1/1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished cases again.")] = False,
    save_probabilities: Annotated[
        bool,
        typer.Option(
            "--save-probabilities",
            help="Also write OUT/probabilities/CASE.nii.gz: (I, J, K, channels), 16 bits a voxel, background first.",
        ),
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="0,1",
            help="Deal the cases to several devices, in place of --device: numbers of GPUs, or names as in cuda:1,cpu.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change a setting of network, windows or postprocess, such as network.output_stride=8 or "
            "postprocess.crf=true; repeatable.",
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="auto: bf16 where the hardware has it.")] = Precision.auto,
    engine: Annotated[
        Engine,
        typer.Option(
            help="What runs the network: torch, compile (torch.compile), or openvino on a CPU (pip install "
            "'medseg[openvino]'); given up with a warning where it differs from torch."
        ),
    ] = Engine.torch,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Segment images; masks come back on each image's own grid.

    What is finished and was made of the same input by the same model with the same settings is skipped, so the same
    command goes on after an interruption. A case that fails costs no other; run.json tells what became of each.
    """
    _log(verbose)
    options = medseg.InferOptions(
        device=device,
        devices=_devices(devices),
        precision=precision.value,
        engine=engine.value,
        window=_window(window),
        tta=tta.value,
        overlap=overlap,
        shard=_shard(shard),
        overwrite=overwrite,
        save_probabilities=save_probabilities,
        settings=_settings(settings),
    )
    with shown_progress() as progress:
        results = medseg.infer(inputs, model, output, options, progress=progress)
    counted = Counter(r.status for r in results)
    _print_outlook(results)
    line = f"{output}: {counted['done']} masks written, {counted['skipped']} there already"
    if not counted["not_done"]:
        _finish(f"{line}, {counted['failed']} cases failed", _failed(results))
        return
    for reason in _failed([r for r in results if r.status == "failed"]):
        err.print(f"[red]failed:[/red] {escape(reason)}")
    why = next(r.reason for r in results if r.status == "not_done")
    done = f"{counted['done']} masks are written and on record, {counted['skipped']} were there already"
    err.print(
        f"[red]error:[/red] {escape(str(why))}: {done}, {counted['not_done']} cases are not done; "
        "free space and run the same command again"
    )
    raise typer.Exit(SOME_FAILED)


@app.command(epilog="Example: medseg evaluate masks/ my_data/labelsTr -o report/ --labels runs/first")
def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of masks, or one mask.")],
    references: Annotated[Path, typer.Argument(metavar="REFERENCES", help="Folder of label maps, or one.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="REPORT", help="Folder for the report.")],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE|RUN", help="Names of the labels: run folder, dataset.json or YAML.")
    ] = None,
    ignore_label: Annotated[
        int | None, typer.Option(metavar="VALUE", help="Leave out voxels where the reference has this value.", min=0)
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Images to draw the contours on.")] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Subgroups: a column `case`, others such as site or age. Columns of few texts are taken as they are, "
            "ages by decade, other numbers by quartile.",
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of the metadata that names patients: they, not scans, are the unit of the statistics. Left "
            "out: one called group, patient, subject, patient_id or subject_id.",
        ),
    ] = None,
    nsd_tolerance_mm: Annotated[
        str,
        typer.Option(
            metavar="T|NAME=T,...",
            help="Tolerance of the surface Dice in mm; by label, as in 1,liver=2 (1 for all but the liver).",
        ),
    ] = "1",
    surface: Annotated[Surface, typer.Option(help="How surfaces are measured.")] = Surface.surfel,
    extra: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="More measures: boundary-iou, cldice (of vessels and other lines)."),
    ] = None,
    lesions: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Judge lesions one by one (lesions.csv). default: any overlap finds one; panoptic: IoU above 0.5; "
            "brats2023, brats2023_men, brats2023_met: as the challenge.",
        ),
    ] = None,
    probabilities: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Calibration from what infer --save-probabilities wrote, or nnU-Net's .npz."),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Report missing predictions instead of refusing.")
    ] = False,
    resample_prediction: Annotated[
        bool,
        typer.Option(
            "--resample-prediction",
            help="Bring predictions to the grid of the reference (nearest neighbour); the report names them.",
        ),
    ] = False,
    nnunet_summary: Annotated[
        bool, typer.Option("--nnunet-summary", help="Write nnunet_summary.json too, in the form of nnU-Net v2.")
    ] = False,
    pdf: Annotated[bool, typer.Option("--pdf", help="Write report.pdf too.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="Cases at a time. Left out: one per core, 16 at most, fewer where memory is short.", min=1),
    ] = None,
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Compare masks with references: Dice, distances, volumes, as CSV, JSON and one HTML page.

    A mask belongs to the reference of the same name, whatever their endings: a.nii.gz to a.nrrd. Hidden files, files
    that are no images and folders are passed over; a name that comes twice, a file that cannot be read or a mask on
    another grid costs only its case. Predictions without a reference are left out and named.
    """
    _log(verbose)
    options = medseg.EvaluateOptions(
        labels=medseg.read_labels(labels) if labels else None,
        ignore_value=ignore_label,
        surface=surface.value,
        nsd_tolerance_mm=_tolerances(nsd_tolerance_mm),
        resample_prediction=resample_prediction,
        allow_missing=allow_missing,
        extra=tuple(name.strip().replace("-", "_") for name in extra.split(",")) if extra is not None else (),
        lesions=lesions,
        probabilities=probabilities,
        group=group,
        jobs=jobs,
    )
    with shown_progress() as progress:
        report = medseg.evaluate(predictions, references, options, images=images, metadata=metadata, progress=progress)
        report.save(output, nnunet_summary=nnunet_summary, pdf=pdf)
    _print_report(report)
    _finish(f"Report: {output / 'report.html'}", _failed((), report))


@app.command(epilog="Example: medseg compare ours=runs/a/report theirs=runs/b/report -o comparison/")
def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="REPORT...",
            help="Two or more report folders, or summaries of nnU-Net; NAME=FOLDER names the method.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the comparison.")],
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Compare methods on the same cases: paired tests, differences with intervals, a ranking, one HTML page."""
    _log(verbose)
    with shown_progress() as progress:
        comparison = medseg.compare(reports, progress=progress)
        comparison.save(output)
    out.print(comparison.text_table(), markup=False)
    for finding in comparison.findings:
        out.print(finding, markup=False)
    _finish(f"Comparison: {output / 'compare.html'}")


@app.command(epilog="Example: medseg inspect deeplabv3plus --spatial-dims 2 --patch 256,256 --png network.png")
def inspect(
    target: Annotated[
        str | None, typer.Argument(metavar="NETWORK|FILE.yaml|RUN", help="A network's name, a YAML file, a run folder.")
    ] = None,
    spatial_dims: Annotated[
        int | None, typer.Option(metavar="1|2|3", help="Left out: those of the patch, the file or the run, else 3.")
    ] = None,
    patch: Annotated[
        str | None, typer.Option(metavar="96,96,96", help="Voxels by axis; left out: the file's or the run's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the taps and the fields of view.")] = None,
    settings: Settings = None,
    names: Annotated[bool, typer.Option("--list", help="List all networks.")] = False,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Look at a network: layers, parameters, multiply-adds, output stride, field of view, gridding."""
    _log(verbose)
    if names:
        out.print(
            json.dumps(list(medseg.list_networks())) if as_json else "\n".join(medseg.list_networks()), markup=False
        )
        return
    if target is None:
        raise medseg.ConfigError("nothing to inspect: give a network's name, a YAML file or a run, or --list")
    with shown_progress() as progress:
        found = medseg.inspect_network(
            target,
            spatial_dims=spatial_dims,
            patch=_patch(patch),
            settings=_settings(settings),
            device=device,
            png=png,
            progress=progress,
        )
    if as_json:
        out.print(json.dumps(found.as_dict(), indent=1), markup=False)
    else:
        print_network(found.report)
    if not as_json:
        _finish(f"Picture: {png}" if png is not None else network_line(found.report))
    elif png is not None:
        err.print(f"Picture: {escape(str(png))}")


def main() -> None:
    """Run the command line and exit with the code that the outcome deserves."""
    # to be told to end is an interruption from the first moment on; whoever ignores it (nohup) has a reason
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == usual:
            signal.signal(number, _end)
    code = run(sys.argv[1:])
    out.settle()
    err.settle()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """The exit code of a command line. A user's mistake is one message; its traceback is shown with -v."""
    try:
        app(arguments, prog_name="medseg")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else USAGE
        return _interrupted() if code == INTERRUPTED else code
    except KeyboardInterrupt:
        return _interrupted()
    except medseg.MedsegError as error:
        logging.getLogger("medseg").debug("traceback", exc_info=True)
        err.print(f"[red]error:[/red] {escape(str(error))}")
        return SOME_FAILED if isinstance(error, medseg.TrainingError) else USAGE
    return OK


def _end(_: int, frame: FrameType | None) -> None:
    """A signal becomes a `KeyboardInterrupt`, but for imports: C++ aborts the process or reports an import twice."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # nothing that is worth waiting for is under way
            os._exit(_interrupted())
        frame = frame.f_back
    raise KeyboardInterrupt


def _interrupted() -> int:
    err.print("interrupted; what was finished is valid")
    return INTERRUPTED


def _log(verbose: bool) -> None:
    logger = logging.getLogger("medseg")
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    handler = RichHandler(console=err, show_time=False, show_path=verbose, markup=False)
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.addHandler(handler)


def _print_report(report: Any) -> None:
    out.print(report.text_table(), markup=False)


def _print_outlook(results: Any) -> None:
    """Which masks want a look and why, the most urgent first, in a few lines; run.json has all of it."""
    lines = []
    for result in results:
        known = [(name, q) for name, q in result.quality.items() if q["expected"] is not None]
        worst = min((q["expected"] for _, q in known), default=1.0)
        words = [
            f"expected Dice of {name} {q['expected']:.2f} ({q['low']:.2f}–{q['high']:.2f})"
            for name, q in known
            # what was not found has words of its own
            if q["expected"] > 0 and (q["expected"] < LOW_DICE or (result.look and q["expected"] == worst))
        ]
        # those on the expected Dice have been said, with the interval
        words += [w for w in result.warnings if ": expected Dice" not in w]
        lines += [(not result.look, worst, f"{result.case}: {'; '.join(words)}")] if words else []
    lines.sort()
    for passable, _, line in lines[:MOST_LINES]:
        err.print(f"[yellow]{'note on' if passable else 'look at'}[/yellow] {escape(line)}")
    more = lines[MOST_LINES:]
    looks = sum(not passable for passable, *_ in more)
    for what, count in (("look at", looks), ("note on", len(more) - looks)):
        if count:
            err.print(f"[yellow]{what}[/yellow] {count} more cases: run.json names them")


def _failed(results: Any = (), report: Any = None) -> list[str]:
    lines = [f"{r.case}: {r.reason}" for r in results if r.status in ("failed", "not_done")]
    if report is not None:
        lines += [f"{f.case}: {f.reason}" for f in report.failures]
    return lines


def _finish(line: str, failed: list[str] | None = None, bad: bool = False) -> None:
    out.print(escape(line))
    for reason in failed or []:
        err.print(f"[red]failed:[/red] {escape(reason)}")
    if failed or bad:
        raise typer.Exit(SOME_FAILED)


def _settings(assignments: list[str] | None, more: dict[str, Any] | None = None) -> dict[str, Any]:
    return medseg.settings_from(assignments or [], more or {})


def _patch(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) > 3:
        raise medseg.ConfigError(f"--patch {text}: expected one to three whole numbers, such as 96,96,96")
    return tuple(int(part) for part in parts)


def _window(text: str) -> Any:
    """`auto`, `whole`, or voxels by axis as the library counts them: i, j, k, the fastest axis of a volume first."""
    if text in ("auto", "whole"):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) not in (2, 3):
        raise medseg.ConfigError(f"--window {text}: expected auto, whole or voxels Z,Y,X such as 64,128,128")
    voxels = tuple(int(part) for part in parts)
    # a picture is (rows, columns) inside as well
    return voxels[::-1] if len(voxels) == 3 else voxels


def _tolerances(text: str) -> Any:
    """One number, or numbers by label name in which `*` stands for the labels that are not named."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        name = name.strip() or "*"
        try:
            tolerance = float(number)
        except ValueError:
            tolerance = math.nan
        # NaN is below nothing
        if not 0 <= tolerance < math.inf or name in found:
            raise medseg.ConfigError(
                f"--nsd-tolerance-mm {text}: expected mm of 0 or more, such as 1 or 1,liver=2 (each label once)"
            )
        found[name] = tolerance
    return found["*"] if list(found) == ["*"] else found


def _devices(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise medseg.ConfigError(f"--devices {text}: expected numbers of GPUs or names, such as 0,1 or cuda:1,cpu")
    return names


def _fold(text: str) -> Any:
    if text != "all" and not text.isdecimal():
        raise medseg.ConfigError(f"--fold {text}: expected a number from 0 or all")
    return "all" if text == "all" else int(text)


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not slash or not part.isdecimal() or not parts.isdecimal():
        raise medseg.ConfigError(f"--shard {text}: expected i/n, such as 1/4")
    return int(part), int(parts)
