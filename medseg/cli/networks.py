"""The verbs inspect, models and export: what a network sees, which trained ones there are, and how one is handed on."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import medseg
from medseg.cli.shared import (
    AnyDevice,
    Device,
    Settings,
    Verbose,
    finish,
    log,
    settings_of,
)
from medseg.terminal import err, network_line, out, print_network, shown_progress


class Form(str, Enum):
    """What a model may become."""

    bundle = "bundle"
    onnx = "onnx"


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
    log(verbose)
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
            settings=settings_of(settings),
            device=device,
            png=png,
            progress=progress,
        )
    if as_json:
        out.print(json.dumps(found.as_dict(), indent=1), markup=False)
    else:
        print_network(found.report)
    if not as_json:
        finish(f"Picture: {png}" if png is not None else network_line(found.report))
    elif png is not None:
        err.print(f"Picture: {escape(str(png))}")


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all that the model cards say.")] = False,
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """List the trained models that come with medseg; their names work as `-m NAME`."""
    log(verbose)
    found = medseg.list_models()
    if as_json:
        out.print(json.dumps([model.as_dict() for model in found], indent=1, ensure_ascii=False), markup=False)
        return
    if not found:
        out.print("No trained model comes with this installation; `medseg train` makes one.")
    for model in found:
        card = model.card
        out.print(f"[bold]{escape(model.name)}[/bold]  {escape(card.title)}")
        dice = ", ".join(f"{n} {d.mean:.3f} ({d.low:.3f}–{d.high:.3f})" for n, d in card.dice.items())
        lines = {
            "segments": card.segments,
            "data": card.data,
            "Dice": f"{dice}; {card.judged}",
            "licence": card.licence,
            "size": f"{model.size / 1e6:.1f} MB",
            "card": str(model.folder / "README.md"),
        }
        for what, text in lines.items():
            out.print(f"  {what:<9}{text}", markup=False)
    if found:
        finish(f"{len(found)} models; use one as `medseg infer IMAGE -m {found[0].name} -o OUT`")


def export(
    run: Annotated[
        list[Path], typer.Argument(metavar="RUN|NAME", help="A run folder, or a name of `medseg models`; one alone.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="onnx: a file.onnx. bundle: a new folder, or a file.zip of it."
        ),
    ],
    to: Annotated[
        Form,
        typer.Option(
            help="onnx: the network as one file, labels and preprocessing in its metadata (pip install '.[onnx]'). "
            "bundle: a MONAI Bundle, from files to masks, that needs no medseg."
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file or the bundle that is there.")
    ] = False,
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Hand a trained model to ONNX Runtime or to MONAI's bundle tools.

    Before anything is written, the network in its new form must give the logits of PyTorch, within 1e-4 of the largest,
    and the same labels but for close calls.
    """
    log(verbose)
    if len(run) > 1:
        raise medseg.ConfigError(
            f"{len(run)} models found, expected one network; export them one by one and average their probabilities"
        )
    with shown_progress() as progress:
        done = medseg.export_model(run[0], output, to=to.value, overwrite=overwrite, progress=progress)
    size, least = (" × ".join(map(str, shape)) for shape in (done.patch_size, done.min_shape))
    takes = {
        "batch and sizes": f"any number of images of {least} voxels or more, trained on {size}",
        "batch": f"any number of images of {size} voxels, no other size",
        "nothing": f"one image of {size} voxels at a time, no other size",
    }[done.free]
    near = f"within {done.difference:.1e} of" if done.difference else "equal to"
    finish(f"{done.path}: {takes}; logits of {done.images} images {near} PyTorch's")


def _patch(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) > 3:
        raise medseg.ConfigError(f"--patch {text}: expected one to three whole numbers, such as 96,96,96")
    return tuple(int(part) for part in parts)
