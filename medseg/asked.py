"""What a training is to be: the plan of its data set, with what is given laid over it; nothing is trained here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from medseg.cases import Dataset
from medseg.check import check_dataset
from medseg.config import Config, NetworkConfig, TrainConfig, check_part, make_config, overlay, read_yaml
from medseg.datasets import read_dataset
from medseg.device import choose_device, free_bytes
from medseg.errors import ConfigError, DataError
from medseg.findings import CaseFacts
from medseg.fingerprint import measure
from medseg.networks import check_settings
from medseg.plan import Plan, make_plan
from medseg.pretrained import inherited_network, read_weights
from medseg.progress import Progress, silent
from medseg.ranks import check_rows
from medseg.regions import check_labels, check_regions
from medseg.sides import is_turned, keep_sides, refuse_other_axes
from medseg.told import data_section, refuse_other_data, told

# a configuration without one of these is laid over the plan of the data set
PLANNED = ("data", "preprocess", "network", "augment", "windows")


@dataclass(frozen=True)
class TrainOptions:
    """What is asked of a training run beside its configuration.

    `config` None: planned from the data set; a YAML that lacks sections is laid over that plan, then `settings`. `fold`
    "all" holds no case back. `resume` goes on from the state in the run folder, if there is one, with the configuration
    that is there; what SIGTERM ended goes on without it, where all else that is asked is the same. `pretrained`:
    weights to begin with, see `load_pretrained`; not read where a state is resumed. `devices`: how many processes, each
    with a device of its own, were started to train together (by `medseg train --devices`, torchrun or SLURM; a script
    that calls `train` is started by torchrun). `command` is only recorded.
    """

    config: Path | Config | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fold: int | Literal["all"] = 0
    folds: int = 5
    device: str = "auto"
    resume: bool = False
    pretrained: Path | None = None
    devices: int = 1
    command: str | None = None


def plan(
    dataset: str | Path,
    *,
    config: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    pretrained: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """The configuration that `train` would use for `dataset`, each choice with its reason.

    `config` and the others as in `TrainOptions`.
    """
    if pretrained is not None:
        read_weights(pretrained)
    options = TrainOptions(config=config, settings=settings or {}, pretrained=pretrained)
    return plan_run(read_dataset(Path(dataset)), options, {}, device=choose_device(device), progress=progress)


def plan_run(
    data: Dataset,
    options: TrainOptions,
    end: Mapping[str, Any],
    *,
    device: torch.device,
    processes: int = 1,
    progress: Progress = silent,
) -> Plan:
    """The configuration of a run: given whole, or planned with what is given laid over; then the options' settings.

    A batch that is planned grows with `processes`, a device each; one that is given must have a sample for every one.
    Raises `ConfigError` for a wrong key or value before any file is read, `DataError` for a data set with errors.
    """
    changes = overlay(options.settings, {"train": end} if end else {})
    values = values_of(options.config)
    source = str(options.config) if isinstance(options.config, Path) else "configuration"
    whole = all(section in values for section in PLANNED)
    config = _changed(make_config(values, source=source), changes) if whole else None
    if config is None:
        check_part(values, source=source)
        check_part(changes, source="--set")
        loop = overlay(values.get("train", {}), changes.get("train", {}))
        _check_clock(overlay(TrainConfig().model_dump(), loop))
        # one that is planned has enough
        check_rows(TrainConfig(batch_size=loop.get("batch_size", processes)).batch_size, processes)
    else:
        check_rows(config.train.batch_size, processes)
    said, typed = data_section(values), data_section(changes)
    if isinstance(options.config, Path):
        refuse_other_data(data, options.config, said, typed)
    # what the labels are called, and which are ignored, decides what is looked for and what is planned
    given = overlay(said, typed)
    if config is None:
        data = told(data, given)
    else:
        found = config.data.model_dump(exclude_defaults=True)
        # regions without an order have got one, which says nothing against that of the data set
        data = told(data, {key: value for key, value in found.items() if key in given})
        if not config.data.labels or (config.data.is_regions and "region_values" not in given):
            ordered = config.data.model_dump() | {"labels": data.labels or {}, "region_values": data.region_values}
            config = make_config(config.model_dump() | {"data": ordered}, source=source)
        _check_clock(config.train.model_dump())
        check_regions(config.data)
        refuse_other_axes(values, changes, source=source, spatial_dims=config.data.spatial_dims)
        config, reasons = keep_sides(config, source=source, typed=_asks_to_mirror(options))
        return Plan(config, reasons, _preflight(data, progress))
    network = overlay(values.get("network", {}), changes.get("network", {}))
    check_settings(NetworkConfig.model_validate(network))
    if data.labels is not None:
        check_labels(data, data.labels)
    facts = _preflight(data, progress)
    published = options.pretrained is not None and bool(network)
    measured = measure(data, facts=facts, turned=is_turned(values, changes), progress=progress)
    refuse_other_axes(values, changes, source=source, spatial_dims=measured.spatial_dims)
    if options.pretrained is not None:
        network = inherited_network(options.pretrained, network, spatial_dims=measured.spatial_dims)
        # weights that do not tell theirs are of the usual one, or of another that is asked for
        network = {"name": NetworkConfig().name, **network}
    made = make_plan(
        data,
        measured,
        device=device.type,
        memory_bytes=free_bytes(device),
        processes=processes,
        network=network,
        published=published,
    )
    reasons = made.reasons_beside(values, changes)
    # labels and regions are planned as they were told, in the order in which regions are written
    values, changes = (_without(given, "data", ("labels", "region_values")) for given in (values, changes))
    config = _changed(make_config(overlay(made.config.model_dump(mode="json"), values), source=source), changes)
    check_regions(config.data)
    config, kept = keep_sides(config, source=source, typed=_asks_to_mirror(options))
    return replace(made, config=config, reasons=reasons | kept, facts=facts)


def _asks_to_mirror(options: TrainOptions) -> bool:
    """Whether somebody typed the axes to mirror along, or wrote them in Python; a file may be one of other data."""
    written = options.config.augment.model_fields_set if isinstance(options.config, Config) else ()
    return "flip_axes" in {*options.settings.get("augment", {}), *written}


def _without(values: Mapping[str, Any], section: str, keys: Sequence[str]) -> dict[str, Any]:
    kept = {key: value for key, value in values.get(section, {}).items() if key not in keys}
    return {**values, section: kept}


def parse_duration(text: str | float) -> float:
    """Seconds of "90", "90s", "20m", "1.5h". Raises `ConfigError`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    words = str(text).strip().lower()
    number, unit = (words[:-1], units[words[-1]]) if words[-1:] in units else (words, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--time-budget {text}: expected a positive time such as 90s, 20m or 1.5h")
    return seconds


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    return make_config(overlay(config.model_dump(mode="json"), changes), source="--set") if changes else config


def values_of(given: Path | Config | None) -> dict[str, Any]:
    """What a configuration sets, all of it or some."""
    if given is None:
        return {}
    return given.model_dump(mode="json") if isinstance(given, Config) else read_yaml(given)


def _check_clock(settings: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where a training must be the same twice and yet end by the clock."""
    if settings["deterministic"] and settings["time_budget_s"] is not None:
        raise ConfigError(
            f"--deterministic with a time budget of {settings['time_budget_s']:g} s: how many steps fit into it, and "
            "so the weights, differ from run to run; expected a number of epochs: use --epochs N"
        )


def _preflight(data: Dataset, progress: Progress) -> tuple[CaseFacts, ...]:
    findings = check_dataset(data, progress=progress)
    if findings.errors:
        listed = "\n".join(f"  {error}" for error in findings.errors[:20])
        raise DataError(
            f"{data.path}: {len(findings.errors)} errors found, nothing was trained; `medseg check` shows all\n{listed}"
        )
    findings.log_warnings()
    return findings.facts
