"""The command `medseg-crossval`: all folds of one or several networks, on one or many machines, to one report."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

import medseg
from medseg.cli.shared import log as log_to_terminal
from medseg.cli.shared import new_app
from medseg.terminal import err, out, show_any_name, shown_progress
from medseg_pipelines.collecting import COMPARISON, OTHERS, REPORT, Network, collect
from medseg_pipelines.crossrecord import PAGE, RECORD, methods_table
from medseg_pipelines.digest import checked
from medseg_pipelines.endings import SOME_FAILED, USAGE, Work, tell, work
from medseg_pipelines.folds import CONFIG, Fold, Found, Weights, failure_of, look, train_fold
from medseg_pipelines.judging import CLEANED, JUDGED
from medseg_pipelines.locks import UNTIL_STALE_S, held, holder_of, publish
from medseg_pipelines.processes import read_json
from medseg_pipelines.trial import DESCRIPTION, STATE
from medseg_pipelines.trials import first_difference

log = logging.getLogger("medseg.crossval")

OK, TERMINATED, INTERRUPTED = 0, 75, 130

CACHE = "cache"
# beside the folders of the networks
TAKEN = (CACHE, JUDGED, REPORT, OTHERS, COMPARISON)

app = new_app("medseg-crossval")


@dataclass(frozen=True)
class Options:
    """What is asked of a cross-validation beside the data set and the folder; what is left out is planned."""

    configs: tuple[Path, ...] = ()
    networks: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    folds: int = 5
    time_budget: str | None = None
    epochs: int | None = None
    seed: int | None = None
    device: str = "auto"
    pretrained: Path | None = None
    only_fold: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of it: `record` of crossval.json where all was collected; else what is `waiting` and why."""

    record: Mapping[str, Any] | None
    report: medseg.Report | None
    failed: tuple[str, ...]
    waiting: tuple[str, ...]


@app.command(epilog="Example: medseg-crossval my_data/ -o cv --time-budget 20m")
def crossval(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A data set as `medseg train` takes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for folds and results.")],
    config: Annotated[
        list[Path] | None,
        typer.Option("-c", "--config", metavar="FILE.yaml", help="Settings; repeatable: the best of several."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting of all; repeatable."),
    ] = None,
    networks: Annotated[str | None, typer.Option(metavar="A,B,…", help="The best of several networks.")] = None,
    folds: Annotated[int, typer.Option(help="Number of folds, where the data set has none of its own.", min=2)] = 5,
    time_budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Training time of each fold: 90s, 20m, 1.5h.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of a time budget.", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.", min=0)] = None,
    pretrained: Annotated[
        Path | None, typer.Option(metavar="FILE|RUN|NAME", help="Weights that every fold begins with.")
    ] = None,
    only_fold: Annotated[
        int | None, typer.Option("--only-fold", metavar="K", help="Train this fold alone, as a task of many.", min=0)
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")] = False,
) -> None:
    """Train the folds that are missing, judge every case out of fold, choose the best, write one report."""
    log_to_terminal(verbose)
    options = Options(
        configs=tuple(config or ()),
        networks=tuple(n.strip() for n in (networks or "").split(",") if n.strip()),
        settings=medseg.settings_from(settings or []),
        folds=folds,
        time_budget=time_budget,
        epochs=epochs,
        seed=seed,
        device=device,
        pretrained=pretrained,
        only_fold=only_fold,
    )
    found = cross_validate(dataset, output, options)
    _tell(output, found)
    if found.failed:
        raise typer.Exit(SOME_FAILED)


def cross_validate(dataset: Path, folder: Path, options: Options) -> Outcome:
    """Train what is missing and nobody else trains, and collect once all is there.

    Raises `ConfigError`, `DataError` or `OSError` before anything is trained, `TrainingError` for what breaks all off
    later, `KeyboardInterrupt` once the state is saved.
    """
    asked, typed = _asked(options), _typed(options)
    if any((folder / name).is_file() for name in (DESCRIPTION, STATE)):
        raise medseg.ConfigError(f"{folder}: holds a training run, which this folder means then; choose another -o")
    # also where all is trained: without it no network could be judged
    medseg.choose_device(options.device)
    weights = None if options.pretrained is None else _weights(options.pretrained)
    data = medseg.read_dataset(dataset)
    _refuse_other_data(data, asked, folder, options)
    facts = _facts(data, asked)
    number = options.folds if data.folds is None else len(data.folds)
    splits = [medseg.fold_split(data, k, folds=options.folds) for k in range(number)]
    if options.only_fold is not None:
        medseg.fold_split(data, options.only_fold, folds=options.folds)
    for name, ask in asked.items():
        there = _written(folder / name)
        if there is not None:
            _refuse_other_settings(there, ask, typed)
    # a file is in most of the folds
    read_once = cache(medseg.file_sha256)
    for k, (training, held_back) in enumerate(splits):
        _refuse_leaks(k, training, held_back, weights, read_once, facts)
    files = dict(zip(asked, _files(options)))
    drafts = {name: _draft(ask, files.get(name), dataset, folder / name, options) for name, ask in asked.items()}
    _refuse_other_labels({name: config for name, (config, _) in drafts.items()})
    configs = {name: _settled(folder / name / CONFIG, text, asked[name], typed) for name, (_, text) in drafts.items()}
    digests = [[medseg.data_sha256(part, file_digest=read_once) for part in split] for split in splits]
    folds = []
    for name, config in configs.items():
        for k, (training, held_back) in enumerate(splits):
            place = folder / name / f"fold_{k}"
            learnt, judged_by = digests[k]
            parts = tuple(training), tuple(held_back), learnt, judged_by, options.folds
            folds.append((name, Fold(k, place, dataset, config, *parts, options.device, weights)))
    # what cannot be gone on with is told before anything is trained
    for _, fold in folds:
        look(fold)
    asked_for = [f for f in folds if options.only_fold in (None, f[1].number)]
    # a task that is queued again may come before the lock of its killed predecessor is stale
    patience_s = 0.0 if options.only_fold is None else UNTIL_STALE_S
    judged = {case.id for _, held_back in splits for case in held_back}
    setup = {
        "dataset": dataset.resolve().name,
        "folds": number,
        "cases": len(judged),
        "cases_never_held_back": sorted({case.id for case in data.labelled} - judged),
        "patients": len({case.group for case in data.labelled if case.id in judged}),
        "networks": list(configs),
        "device": options.device,
        "pretrained": None if options.pretrained is None else options.pretrained.name,
    }
    groups = {case.id: case.group for case in data.cases}
    with work() as so_far:
        failed = _train(asked_for, folder, patience_s, so_far)
        return _collect(folder, folds, failed, setup, groups, options.device, patience_s)


def main() -> None:
    """Run the command line and exit with the code that the outcome deserves."""
    show_any_name()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of a command line. A user's mistake is one message; its traceback is shown with -v."""
    with _told_of_signals() as came:
        try:
            app(arguments, prog_name="medseg-crossval")
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else USAGE
            if code == INTERRUPTED:
                err.print("interrupted; the same command goes on from here")
                return TERMINATED if signal.SIGTERM in came() else INTERRUPTED
            return code
        except (medseg.MedsegError, OSError) as error:
            return tell(error)
    return OK


@contextmanager
def _told_of_signals() -> Iterator[Callable[[], bytes]]:
    """SIGTERM is an interrupt; the block gets a function that tells which signals came.

    While masks are made inference has handlers of its own, and an interrupt is all that is left of a signal then.
    """
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.signal(signal.SIGTERM, _terminated)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def came() -> bytes:
        try:
            return os.read(reader, 4096)
        except BlockingIOError:
            return b""

    try:
        yield came
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)
        os.close(reader)
        os.close(writer)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _asked(options: Options) -> dict[str, dict[str, Any]]:
    """By the name of its folder, the settings that are asked of each network."""
    if options.time_budget is not None and options.epochs is not None:
        raise medseg.ConfigError("--time-budget and --epochs: give one of them")
    if options.networks and "name" in (options.settings or {}).get("network", {}):
        raise medseg.ConfigError("--set network.name: give either this or --networks")
    asked: dict[str, dict[str, Any]] = {}
    for file in options.configs or (None,):
        base = {} if file is None else medseg.read_yaml(file)
        medseg.check_part(base, source=str(file))
        for network in options.networks or (None,):
            ask = medseg.overlay(base, _typed(options))
            ask = ask if network is None else medseg.overlay(ask, {"network": {"name": network}})
            # the file alone was right, so what is wrong came with the command
            section = medseg.check_part(ask, source="--set")
            medseg.check_settings(section)
            name = section.name
            if file is not None and len(options.configs) > 1:
                name = file.stem if network is None else f"{file.stem}-{name}"
            if name in TAKEN or "+" in name or name.endswith(CLEANED):
                raise medseg.ConfigError(
                    f"{file}: {name} would be mixed up with what a cross-validation writes; give the file another name"
                )
            if name in asked:
                raise medseg.ConfigError(f"{name}: given twice, and both would be written into the folder of this name")
            asked[name] = ask
    return asked


def _typed(options: Options) -> dict[str, Any]:
    """What the command sets of all networks, whatever their files say."""
    train: dict[str, Any] = {} if options.seed is None else {"seed": options.seed}
    if options.time_budget is not None:
        train |= {"epochs": None, "time_budget_s": medseg.parse_duration(options.time_budget)}
    elif options.epochs is not None:
        train |= {"epochs": options.epochs, "time_budget_s": None}
    return medseg.overlay(options.settings or {}, {"train": train} if train else {})


def _refuse_other_data(data: Any, asked: Mapping[str, Mapping[str, Any]], folder: Path, options: Options) -> None:
    """Raises `ConfigError` where a file contradicts the data set, unless its networks are planned already."""
    typed = (options.settings or {}).get("data", {})
    new = [file for file, name in zip(_files(options), asked) if _written(folder / name) is None]
    for file in dict.fromkeys(new):
        values = medseg.read_yaml(file)
        medseg.refuse_other_data(data, file, values.get("data", {}), typed)


def _files(options: Options) -> list[Path]:
    """The file of each network, in the order in which they are asked."""
    return [file for file in options.configs for _ in options.networks or (None,)]


# of the data section, what decides what is found in files
TOLD = ("labels", "region_values", "channels")


def _facts(data: Any, asked: Mapping[str, Mapping[str, Any]]) -> Sequence[Any]:
    """What a look at all files found, with the labels and channels that each of the networks is to have."""
    sections: list[Mapping[str, Any]] = []
    for ask in asked.values():
        # the rest of a section changes nothing of what is found
        given = {key: value for key, value in ask.get("data", {}).items() if key in TOLD}
        if given not in sections:
            sections.append(given)
    looked = [checked(data, given) for given in sections]
    # what decides about leaks is the same in all
    return looked[0].facts


def _refuse_leaks(
    number: int,
    training: Sequence[medseg.Case],
    held_back: Sequence[medseg.Case],
    weights: Weights | None,
    file_digest: Callable[[Path], str],
    facts: Sequence[Any],
) -> None:
    """Raises `ConfigError` where a fold would judge what it has learnt; one such fold spoils what all tell together."""
    try:
        begins_with = None if weights is None else weights.file
        medseg.refuse_leaks(training, held_back, weights=begins_with, file_digest=file_digest, facts=facts)
    except medseg.ConfigError as error:
        raise medseg.ConfigError(f"fold {number}: {error}") from error


def _weights(path: Path) -> Weights:
    # not through a link: what the weights have learnt is told beside it
    file = medseg.weights_file(path).absolute()
    if not file.is_file():
        raise medseg.ConfigError(f"--pretrained {path}: no such file, nor a run folder or a name of `medseg models`")
    return Weights(file, medseg.file_sha256(file))


def _draft(
    ask: Mapping[str, Any], file: Path | None, dataset: Path, place: Path, options: Options
) -> tuple[medseg.Config, str]:
    """The configuration of a network and its text: what its folder `place` has, else planned now; nothing is written.

    `ask` is what its `file` and the command say. What cannot be is told once and leaves nothing behind, nor does a
    network beside it.
    """
    there = _written(place)
    if there is not None:
        return medseg.read_config(there), there.read_text(encoding="utf-8")
    typed = _typed(options)
    if options.networks:
        typed = medseg.overlay(typed, {"network": {"name": ask["network"]["name"]}})
    with shown_progress() as progress:
        made = medseg.plan(
            dataset,
            config=file,
            settings=typed,
            device=options.device,
            pretrained=options.pretrained,
            progress=progress,
        )
    data = made.config.data
    medseg.build_network(
        made.config.network,
        spatial_dims=data.spatial_dims,
        in_channels=len(data.channels),
        out_channels=data.out_channels,
    )
    return made.config, medseg.dump_yaml(made.config, made.reasons)


def _refuse_other_labels(configs: Mapping[str, medseg.Config]) -> None:
    """Raises `ConfigError` where two networks segment different things: no Dice says which of them is better."""
    (first, one), *others = configs.items()
    for name, other in others:
        here, there = _segmented(one), _segmented(other)
        unlike = next((label for label in (*here, *there) if here.get(label) != there.get(label)), None)
        if unlike is not None:
            values = [sorted(found[unlike]) if unlike in found else "not there" for found in (here, there)]
            raise medseg.ConfigError(
                f"{first} and {name}: segment different things (data.labels: {unlike} is {values[0]} in {first} and "
                f"{values[1]} in {name}), and the better of them cannot be chosen; give both the same data.labels, or "
                "cross-validate each of them alone, with a -o of its own"
            )


def _segmented(config: medseg.Config) -> dict[str, frozenset[int]]:
    """What each label stands for in the files, the ignored ones too, equal where it means the same."""
    labels = {name: value for name, value in config.data.labels.items() if name != "background"}
    return {name: frozenset(value if isinstance(value, tuple) else (value,)) for name, value in labels.items()}


def _settled(file: Path, text: str, ask: Mapping[str, Any], typed: Mapping[str, Any]) -> medseg.Config:
    """The one configuration of all folds of a network, which is `text` unless another machine was first to write it.

    Raises `ConfigError` where it is not what is asked.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        publish(file, text)
    return _refuse_other_settings(file, ask, typed)


def _written(folder: Path) -> Path | None:
    """The configuration of a network's folds, where there is one."""
    return next((p for p in (folder / CONFIG, *sorted(folder.glob(f"fold_*/{CONFIG}"))) if p.is_file()), None)


def _refuse_other_settings(file: Path, ask: Mapping[str, Any], typed: Mapping[str, Any]) -> medseg.Config:
    found = medseg.read_config(file)
    if not found.augment.flip_axes and "flip_axes" not in typed.get("augment", {}):
        # a file's axes may have been left out: labels that tell sides apart are not mirrored
        ask = {**ask, "augment": {key: value for key, value in ask.get("augment", {}).items() if key != "flip_axes"}}
    asked = medseg.make_config(medseg.overlay(found.model_dump(mode="json"), ask), source="what is asked")
    other = first_difference(found.model_dump(mode="json"), asked.model_dump(mode="json"))
    if other is not None:
        raise medseg.ConfigError(f"{file}: holds other settings ({other}); leave that out, or choose another -o")
    return found


def _train(folds: Sequence[tuple[str, Fold]], folder: Path, patience_s: float, so_far: Work) -> dict[Path, str]:
    """Train what is missing and free, one after the other; why folds failed, by their folders."""
    failed: dict[Path, str] = {}
    for number, (name, fold) in enumerate(folds, start=1):
        place = f"{number}/{len(folds)} {name}, fold {fold.number}"
        if _to_do(fold, place, failed) is None:
            continue
        with held(fold.lock, patience_s=patience_s) as lock:
            # another may have finished it while the lock was waited for
            if lock is None:
                out.print(escape(f"{place}: {holder_of(fold.lock) or 'another machine'} trains it"))
            elif (found := _to_do(fold, place, failed)) is not None:
                out.print(escape(f"{place}: {found.reason or 'training'}; its log is {fold.folder / 'log.txt'}"))
                start = time.monotonic()
                reason = train_fold(fold, lock, cache=folder / CACHE)
                so_far.trained = True
                if reason is not None:
                    failed[fold.folder] = reason
                    err.print(f"{place}: [red]failed:[/red] {escape(reason)}")
                else:
                    out.print(escape(f"{place}: done, {time.monotonic() - start:.0f} s"))
    return failed


def _to_do(fold: Fold, place: str, failed: dict[Path, str]) -> Found | None:
    """What is missing; None, and it is said why, where there is nothing to train."""
    found = look(fold)
    if found.state == "done":
        out.print(escape(f"{place}: there already"))
    elif found.state == "damaged":
        failed[fold.folder] = found.reason
        err.print(f"{place}: [red]failed:[/red] {escape(found.reason)}")
    elif found.state == "elsewhere":
        out.print(escape(f"{place}: {found.reason}"))
    return found if found.state == "missing" else None


def _collect(
    folder: Path,
    folds: Sequence[tuple[str, Fold]],
    failed: Mapping[Path, str],
    setup: Mapping[str, Any],
    groups: Mapping[str, str],
    device: str,
    patience_s: float,
) -> Outcome:
    """The result, if no fold is being trained or still to be trained by somebody else."""
    stand = _stand(folds, failed)
    if stand.waiting:
        return Outcome(None, None, stand.failed, stand.waiting)
    _warn_of_devices(stand.found)
    place = folder / "collect.lock"
    before = _written_at(folder / RECORD)
    with held(place, patience_s=patience_s) as lock:
        if lock is None:
            whose = holder_of(place) or "another machine"
            return Outcome(None, None, stand.failed, (f"collecting: {whose} does it",))
        if _written_at(folder / RECORD) != before:
            # by another task, meanwhile; it may have looked before the last fold was done
            stand = _stand(folds, failed)
            if stand.waiting:
                return Outcome(None, None, stand.failed, stand.waiting)
            written = read_json(folder / RECORD)
            if written is not None and _is_of(written, stand.found):
                return Outcome(written, None, _failures(written), ())
        with shown_progress() as progress:
            record, judged = collect(folder, stand.networks, setup, groups, device=device, progress=progress)
    return Outcome(record, None if judged is None else judged.report, _failures(record), ())


def _failures(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{f['name']}: {f['reason']}" for f in record["failures"])


@dataclass(frozen=True)
class _Stand:
    """What became of the folds: in words those that failed here, and those that somebody else has still to train."""

    found: Sequence[tuple[str, Fold, Found]]
    broken: Mapping[Path, str]
    failed: tuple[str, ...]
    waiting: tuple[str, ...]

    @property
    def networks(self) -> list[Network]:
        """Each with its folds, and why some of them are none."""
        return [
            Network(
                name,
                tuple((f, s) for n, f, s in self.found if n == name),
                {
                    f.folder.name: self.broken[f.folder]
                    for n, f, _ in self.found
                    if n == name and f.folder in self.broken
                },
            )
            for name in dict.fromkeys(n for n, _, _ in self.found)
        ]


def _stand(folds: Sequence[tuple[str, Fold]], failed: Mapping[Path, str]) -> _Stand:
    found = [(name, fold, look(fold)) for name, fold in folds]
    broken = {f.folder: s.reason for _, f, s in found if s.state == "damaged"} | dict(failed)
    # what another task tried and nobody tries again now
    elsewhere = {
        f.folder: reason
        for _, f, s in found
        if s.state == "missing" and f.folder not in broken and holder_of(f.lock) is None and (reason := failure_of(f))
    }
    listed = tuple(f"{name}, fold {f.number}: {broken[f.folder]}" for name, f, _ in found if f.folder in broken)
    waiting = {
        f.folder: f"{name}, fold {f.number}: {_whose(f, s)}"
        + (f"; it failed before: {elsewhere[f.folder]}" if f.folder in elsewhere else "")
        for name, f, s in found
        if s.state in ("missing", "elsewhere") and f.folder not in broken
    }
    if waiting.keys() <= elsewhere.keys():
        return _Stand(found, broken | elsewhere, listed, ())
    return _Stand(found, broken, listed, tuple(waiting.values()))


def _is_of(record: Mapping[str, Any], found: Sequence[tuple[str, Fold, Found]]) -> bool:
    """Whether crossval.json was made of these very models."""
    there = {
        (network.get("name"), fold.get("fold")): fold.get("weights_sha256")
        for network in record.get("networks", ())
        for fold in network.get("folds", ())
    }
    return there == {(name, fold.number): one.description.get("weights_sha256") for name, fold, one in found}


def _written_at(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None


def _warn_of_devices(found: Sequence[tuple[str, Fold, Found]]) -> None:
    """Where a machine did not see its GPU, its fold has had a small share of the steps in the same time."""
    kinds: dict[str, list[str]] = {}
    for name, fold, there in found:
        if there.state == "done":
            kind = str(there.description["training"].get("device", "unknown")).partition(" ")[0].partition(":")[0]
            kinds.setdefault(kind, []).append(f"{name}, fold {fold.number}")
    if len(kinds) > 1:
        where = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        log.warning("trained on devices of several kinds (%s): compare their steps in %s", where, PAGE)


def _whose(fold: Fold, found: Found) -> str:
    if found.state == "elsewhere":
        return found.reason
    holder = holder_of(fold.lock)
    return found.reason or "not trained yet" if holder is None else f"{holder} trains it"


def _tell(folder: Path, found: Outcome) -> None:
    """The last words of the command."""
    if found.report is not None:
        out.print(found.report.text_table(), markup=False)
    if found.record is not None:
        if len(found.record["methods"]) > 1:
            out.print(methods_table(found.record["methods"]), markup=False)
        best = found.record["best"]
        if best is not None:
            for reason in best["reasons"]:
                out.print(escape(reason))
            out.print(f"For new cases:\n{best['command']}", markup=False)
        page = escape(str(folder / PAGE))
        out.print(page if found.report is None else f"Report: {escape(str(folder / REPORT / 'report.html'))}, {page}")
    for reason in found.waiting:
        out.print(escape(f"waiting: {reason}"))
    if found.waiting:
        out.print("not collected yet; the same command does it once all folds are there")
    for reason in found.failed:
        err.print(f"[red]failed:[/red] {escape(reason)}")


if __name__ == "__main__":
    main()
