"""The first five minutes: train on the sample data, segment held-back cases, report; only public steps are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medseg.asked import TrainOptions
from medseg.errors import DataError
from medseg.evaluate import EvaluateOptions
from medseg.folder import CaseResult, infer
from medseg.infer import InferOptions
from medseg.progress import Progress, silent
from medseg.report import Report, evaluate
from medseg.train import Run, train

SAMPLE = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Demo:
    """What the demo leaves behind."""

    folder: Path
    run: Run
    results: tuple[CaseResult, ...]
    report: Report


def demo(
    out: str | Path = "demo", *, time_budget: str | float = "3m", device: str = "auto", progress: Progress = silent
) -> Demo:
    """Hippocampus MR: train for `time_budget`, segment the held-back cases into `out`/masks, write `out`/report.html.

    The run folder is `out`/run (run2, run3 … where earlier demos have been: nothing is deleted).
    """
    folder = Path(out)
    if not (SAMPLE / "dataset.json").is_file():
        raise DataError(f"{SAMPLE}: the sample data is missing; install medseg again")
    run_folder = fresh_folder(folder)
    run = train(
        SAMPLE,
        run_folder,
        time_budget=time_budget,
        options=TrainOptions(fold="all", device=device),
        progress=progress,
    )
    options = InferOptions(device=device, overwrite=True)
    results = infer([SAMPLE / "imagesTs"], [run_folder], folder / "masks", options, progress=progress)
    labels = {name: run.config.data.labels[name] for name in run.config.data.foreground}
    report = evaluate(folder / "masks", SAMPLE / "labelsTs", EvaluateOptions(labels=labels), images=SAMPLE / "imagesTs")
    report.save(folder)
    return Demo(folder, run, results, report)


def fresh_folder(folder: Path) -> Path:
    """`folder`/run, or `folder`/run2 … where earlier demos have been: nothing is deleted."""
    number = 1
    while (path := folder / ("run" if number == 1 else f"run{number}")).exists():
        number += 1
    return path
