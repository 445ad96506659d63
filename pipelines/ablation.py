"""The command `medseg-ablation`: networks against each other on one data set, and the founding claims with numbers."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

import medseg
from medseg.cli.shared import log as log_to_terminal
from medseg.cli.shared import new_app
from medseg.terminal import err, out
from medseg_pipelines.claims import Claim, choose_claims
from medseg_pipelines.digest import checked, data_sha256
from medseg_pipelines.discs import FOLDS, make_discs
from medseg_pipelines.endings import SOME_FAILED, USAGE, tell, work
from medseg_pipelines.lineup import BASELINE, LIBRARY, Entry, EqualTo, Planner, line_up, structure
from medseg_pipelines.markdown import markdown
from medseg_pipelines.page import render
from medseg_pipelines.results import Setup, make_record, table_text
from medseg_pipelines.trials import Trial, TrialResult, refuse_other_settings, run_trial

OK, INTERRUPTED = 0, 130
NAME = "ablation"
GENERAL = ("network", "loss", "train")
# settings of the training that have an option of their own
OPTION_FOR = {"seed": "--seeds", "epochs": "--time-budget", "time_budget_s": "--time-budget"}

app = new_app("medseg-ablation")


class Equal(str, Enum):
    """What `--equal` may make equal."""

    multiply_adds = "multiply-adds"
    parameters = "parameters"
    none = "none"


@dataclass(frozen=True)
class Options:
    """What is asked of an ablation beside the data set and the folder. `networks` None: all of them."""

    networks: tuple[str, ...] | None = None
    claims: tuple[Claim, ...] = ()
    time_budget: str = "2m"
    seeds: int = 1
    fold: int = 0
    folds: int = 5
    settings: Mapping[str, Any] | None = None
    equal: EqualTo = "multiply-adds"
    published: bool = False
    device: str = "auto"
    overwrite: bool = False
    """Replace runs of other settings or data, finished or begun."""


@app.command(epilog="Example: medseg-ablation my_data/ -o ablation --time-budget 10m --claims all")
def ablation(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A data set as `medseg train` takes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for runs and results.")],
    networks: Annotated[
        str | None, typer.Option(metavar="A,B,…", help=f"Left out: all. {BASELINE} always takes part.")
    ] = None,
    claims: Annotated[str, typer.Option(metavar="all|none|A,B,…", help="Founding claims to judge.")] = "none",
    time_budget: Annotated[str, typer.Option(metavar="TIME", help="Training time of each run: 90s, 20m, 1.5h.")] = "2m",
    seeds: Annotated[int, typer.Option(help="Runs of each network.", min=1)] = 1,
    fold: Annotated[int, typer.Option(help="Fold held back to judge on.", min=0)] = 0,
    folds: Annotated[int, typer.Option(help="Number of folds, where the data set has none of its own.", min=2)] = 5,
    equal: Annotated[Equal, typer.Option(help="What all networks have alike.")] = Equal.multiply_adds,
    as_published: Annotated[bool, typer.Option("--as-published", help="Keep the widths of the papers.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting of all; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace runs of other settings, begun ones too.")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")] = False,
) -> None:
    """Train every network alike on one data set; write ablation.json, .csv, .md, .html. Finished runs stay."""
    log_to_terminal(verbose)
    options = Options(
        networks=None if networks is None else tuple(n.strip() for n in networks.split(",") if n.strip()),
        claims=choose_claims(claims),
        time_budget=time_budget,
        seeds=seeds,
        fold=fold,
        folds=folds,
        settings=medseg.settings_from(settings or []),
        equal=equal.value,
        published=as_published,
        device=device,
        overwrite=overwrite,
    )
    record = ablate(dataset, output, options)
    out.print(escape(f"Report: {output / f'{NAME}.html'}"))
    for failure in record["failures"]:
        err.print(f"[red]failed:[/red] {escape(failure['name'])}: {escape(failure['reason'])}")
    if record["failures"]:
        raise typer.Exit(SOME_FAILED)


def ablate(dataset: Path, folder: Path, options: Options) -> dict[str, Any]:
    """Run what is not done yet and write the results into `folder` after every run; the record of ablation.json.

    Raises `ConfigError`, `DataError` or `OSError` before anything is trained, `TrainingError` for what breaks all off
    later.
    """
    settings, names = _settings(options), _networks(options)
    planners = {"given": _planner(dataset, settings, options)}
    medseg.check_part(settings, source="--set")
    findings = checked(medseg.read_dataset(dataset), settings.get("data", {}))
    medseg.fold_split(findings.dataset, options.fold, folds=options.folds)
    groups = {case.id: case.group for case in findings.dataset.cases}
    digests = {"given": data_sha256(findings)}
    if any(variant.data == "discs" for claim in options.claims for variant in claim.variants):
        # grids, patches and augmentation of the given data set say nothing about pictures of discs
        general = {name: values for name, values in settings.items() if name in GENERAL}
        discs = make_discs(folder / "discs")
        planners["discs"], digests["discs"] = (
            _planner(discs, general, options),
            data_sha256(checked(medseg.read_dataset(discs))),
        )
    default = planners["given"].default
    entries = line_up(names, options.claims, planners, say=_warn)
    setup = Setup(
        dataset=dataset.resolve().name,
        time_budget_s=default.train.time_budget_s or 0.0,
        seeds=options.seeds,
        fold=options.fold,
        folds=options.folds,
        equal=planners["given"].equal,
        published=options.published,
        device=options.device,
        reference={"name": default.network.name, "patch_size": list(default.windows.patch_size)} | structure(default),
    )
    trials = [t for seed in range(options.seeds) for e in entries for t in _trials(e, seed, folder, options, digests)]
    if not options.overwrite:
        refuse_other_settings(trials)
    done: dict[str, list[TrialResult]] = {}
    record = _save(folder, setup, entries, done, options, groups)
    _announce(trials, setup)
    with work() as so_far:
        for number, trial in enumerate(trials, start=1):
            start = time.monotonic()
            result = run_trial(trial, cache=folder / "cache", overwrite=options.overwrite)
            so_far.trained = True
            done.setdefault(trial.variant, []).append(result)
            record = _save(folder, setup, entries, done, options, groups)
            _tell(number, len(trials), result, record, time.monotonic() - start)
    return record


def main() -> None:
    """Run the command line and exit with the code that the outcome deserves."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of a command line. A user's mistake is one message; its traceback is shown with -v."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        app(arguments, prog_name="medseg-ablation")
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else USAGE
        if code == INTERRUPTED:
            err.print("interrupted; the same command goes on from here")
        return code
    except (medseg.MedsegError, OSError) as error:
        return tell(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    return OK


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _settings(options: Options) -> dict[str, Any]:
    end = medseg.settings_from(
        [f"train.time_budget_s={medseg.parse_duration(options.time_budget)}", "train.epochs=null"]
    )
    settings = dict(options.settings or {})
    for key in settings.get("train", {}):
        if key in OPTION_FOR:
            raise medseg.ConfigError(f"--set train.{key}: this is given by {OPTION_FOR[key]}; use that instead")
    return {**settings, "train": {**end["train"], **settings.get("train", {})}}


def _planner(dataset: Path, settings: Mapping[str, Any], options: Options) -> Planner:
    return Planner(dataset, settings, device=options.device, equal=options.equal, published=options.published)


def _networks(options: Options) -> tuple[str, ...]:
    known = medseg.list_networks()
    names = known if options.networks is None else options.networks
    wrong = [name for name in names if name not in known and not name.startswith(LIBRARY)]
    if wrong or not names:
        raise medseg.ConfigError(
            f"--networks: there is no `{', '.join(wrong)}`; choose from {', '.join(known)} and monai.CLASS"
        )
    arguments = dict(options.settings or {}).get("network", {}).get("arguments", {})
    for name in names:
        if name.startswith(LIBRARY):
            medseg.check_settings(medseg.make_config({"network": {"name": name, "arguments": arguments}}).network)
    return tuple(dict.fromkeys((*names, BASELINE) if BASELINE in known else names))


def _trials(entry: Entry, seed: int, folder: Path, options: Options, digests: Mapping[str, str]) -> list[Trial]:
    if entry.config is None:
        return []
    values = entry.config.model_dump(mode="json")
    config = medseg.make_config({**values, "train": {**values["train"], "seed": seed}})
    fold, folds = (0, FOLDS) if entry.data == "discs" else (options.fold, options.folds)
    place = folder / "runs" / entry.name / f"seed-{seed}"
    digest = digests[entry.data]
    return [Trial(place, entry.name, seed, entry.dataset, digest, config, fold, folds, options.device)]


def _save(
    folder: Path,
    setup: Setup,
    entries: Sequence[Entry],
    done: Mapping[str, Sequence[TrialResult]],
    options: Options,
    groups: Mapping[str, str],
) -> dict[str, Any]:
    record = make_record(setup, entries, done, options.claims, groups=groups)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    medseg.write_text(folder / f"{NAME}.json", text + "\n")
    medseg.write_text(folder / f"{NAME}.csv", table_text(record))
    medseg.write_text(folder / f"{NAME}.md", markdown(record))
    medseg.write_text(folder / f"{NAME}.html", render(record))
    return record


def _announce(trials: Sequence[Trial], setup: Setup) -> None:
    minutes = len(trials) * setup.time_budget_s / 60
    out.print(f"{len(trials)} runs of {setup.time_budget_s:g} s: at least {minutes:.0f} minutes of training in all")


def _tell(number: int, total: int, result: TrialResult, record: Mapping[str, Any], seconds: float) -> None:
    name = f"{result.trial.variant} seed {result.trial.seed}"
    if result.reason is not None:
        err.print(f"{number}/{total} [red]failed:[/red] {escape(name)}: {escape(result.reason)}")
        return
    variant = next(v for v in record["variants"] if v["name"] == result.trial.variant)
    if "dice" not in variant:
        err.print(f"{number}/{total} [red]failed:[/red] {escape(name)}: {escape(variant['reason'])}")
        return
    mean = variant["dice"]["mean"]
    dice = "no Dice" if mean is None else f"Dice {mean:.3f}"
    how = "there already" if result.reused else f"{seconds:.0f} s"
    out.print(f"{number}/{total} {escape(name)}: {dice}, {result.content['steps']} steps, {how}")


def _warn(text: str) -> None:
    err.print(f"[yellow]left out:[/yellow] {escape(text)}")


if __name__ == "__main__":
    main()
