"""The verb infer: from scans to masks."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import medseg
from medseg.cli.shared import (
    SOME_FAILED,
    Device,
    Precision,
    ResampleGaps,
    ResampleTilt,
    SeriesUid,
    Verbose,
    failed_cases,
    finish,
    log,
    settings_of,
)
from medseg.terminal import err, shown_progress

# a mask of which less is expected wants a look; of more lines than these nobody reads any
LOW_DICE, MOST_LINES = 0.7, 10


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


def infer(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Files or folders: NIfTI, NRRD, MHA, PNG, TIFF, DICOM.")
    ],
    model: Annotated[
        list[Path],
        typer.Option(
            "-m",
            "--model",
            metavar="RUN|NAME",
            help="Run folder, or a name of `medseg models`; several: an ensemble. Or a folder of medseg-crossval: what "
            "it chose.",
        ),
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
            help="Average over copies of the image. flip: mirrored; scale: of other sizes as well; auto: those, "
            "and moved ones, that held-back cases were not worse with when training ended; none: the fastest. "
            "Each copy costs as much as the image."
        ),
    ] = Tta.auto,
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
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME,...",
            help="What is written of each case: nifti (the mask; of pictures a PNG), dicom-seg, rtstruct, dicom-sr "
            "(volumes and expected Dice), dicom-sc (a summary as an image), picture (the same as a PNG). Those between "
            "nifti and picture are for DICOM series. A case is skipped only where all are there.",
        ),
    ] = "nifti",
    save_probabilities: Annotated[
        bool,
        typer.Option(
            "--save-probabilities",
            help="Also write OUT/probabilities/CASE.nii.gz on the image's grid: a channel for background (regions have "
            "none) and for each label, 16 bits a voxel, as they are before the mask is cleaned. A case is skipped only "
            "where they are there too. `medseg evaluate --probabilities` reads them.",
        ),
    ] = False,
    regions: Annotated[
        bool,
        typer.Option(
            "--regions",
            help="Of a model of regions, such as a tumour and its core: also write OUT/regions/CASE.nii.gz, a channel "
            "of 0 and 1 for each region. In the mask the later region covers the earlier one; here each is whole.",
        ),
    ] = False,
    series: SeriesUid = None,
    resample_tilt: ResampleTilt = False,
    resample_gaps: ResampleGaps = False,
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
            "'.[openvino]'); given up with a warning where it differs from torch."
        ),
    ] = Engine.torch,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Segment images; masks come back on each image's own grid.

    What is finished and was made of the same input by the same model with the same settings is skipped, so the same
    command goes on after an interruption. A case that fails costs no other; run.json tells what became of each.
    """
    log(verbose)
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
        settings=settings_of(settings),
        series=medseg.SeriesOptions(series, resample_tilt, resample_gaps),
        formats=tuple(name.strip() for name in format_.split(",")) + (("regions",) if regions else ()),
    )
    with shown_progress() as progress:
        results = medseg.infer(inputs, model, output, options, progress=progress)
    counted = Counter(r.status for r in results)
    _print_outlook(results)
    line = f"{output}: {counted['done']} masks written, {counted['skipped']} there already"
    if not counted["not_done"]:
        finish(f"{line}, {counted['failed']} cases failed", failed_cases(results))
        return
    for reason in failed_cases([r for r in results if r.status == "failed"]):
        err.print(f"[red]failed:[/red] {escape(reason)}")
    why = next(r.reason for r in results if r.status == "not_done")
    done = f"{counted['done']} masks are written and on record, {counted['skipped']} were there already"
    err.print(
        f"[red]error:[/red] {escape(str(why))}: {done}, {counted['not_done']} cases are not done; "
        "free space and run the same command again"
    )
    raise typer.Exit(SOME_FAILED)


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


def _devices(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise medseg.ConfigError(f"--devices {text}: expected numbers of GPUs or names, such as 0,1 or cuda:1,cpu")
    return names


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not slash or not part.isdecimal() or not parts.isdecimal():
        raise medseg.ConfigError(f"--shard {text}: expected i/n, such as 1/4")
    return int(part), int(parts)
