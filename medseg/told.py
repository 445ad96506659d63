"""What a data set and a configuration each say of labels and channels: what holds, and where they may not differ."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.cases import Dataset, Labels, label_values
from medseg.catalogue import shipped_model
from medseg.config import BACKGROUND, IGNORE, make_data_config, read_yaml
from medseg.errors import ConfigError
from medseg.metrics.codes import members
from medseg.units import is_ct

log = logging.getLogger(__name__)

# forms whose description names channels; elsewhere they are called after columns or nothing
DESCRIBED = ("nnunet", "decathlon")
NAMELESS = ("image",)
# characters of labels that a message shows
MOST_SHOWN = 200
# of a folder, those that say what labels there are; the first one counts
NAMING = ("config.yaml", "model.json", "dataset.json")


def data_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of the data, without the empty `region_values` that every plan has."""
    section = values.get("data") or {}
    return {key: value for key, value in section.items() if key != "region_values" or value}


def unless_repeated(values: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the labels that `held` has too: the order and the values that it gave regions stay."""
    given, labels = data_section(values), (held.get("data") or {}).get("labels") or {}
    if "region_values" in given or not labels or _as_sets(given.get("labels")) != _as_sets(labels):
        return dict(values)
    return {**values, "data": {key: value for key, value in given.items() if key != "labels"}}


def told(data: Dataset, given: Mapping[str, Any], *, source: str = "--set") -> Dataset:
    """`data` with the labels, regions and channels of a `data` section that is laid over what it says.

    Raises `ConfigError` naming `source` where they are impossible.
    """
    given = data_section({"data": given})
    section = make_data_config(
        spatial_dims=given.get("spatial_dims", 3),
        channels=given.get("channels", NAMELESS),
        labels=given.get("labels", {}),
        region_values=given.get("region_values", ()),
        source=source,
    )
    changes = {key: getattr(section, key) for key in ("labels", "region_values", "channels") if key in given}
    if "labels" in given and "region_values" not in given:
        place = {region: n for n, region in enumerate(_regions(data.labels or {}))}
        if data.region_values and section.is_regions and set(_regions(section.labels)) == place.keys():
            # the same regions, whatever they are called, are listed as the data set lists them: its order holds
            by_place = sorted(section.labels.items(), key=lambda label: place.get(frozenset(members(label[1])), -1))
            changes["labels"] = dict(by_place)
        else:
            changes["region_values"] = section.region_values
    return replace(data, **changes)


def refuse_other_data(data: Dataset, file: Path, given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the `data` section `given` in `file` contradicts what the data set itself says.

    Other names for its values and channels, or its values in other groups, are a choice, which is logged. What stands
    in `settings`, the section that was typed beside the file, is meant; so is what the data set leaves open.
    """
    given, settings = data_section({"data": given}), data_section({"data": settings})
    theirs = told(Dataset(data.path, "nnunet", (), NAMELESS), given, source=str(file))
    for key, contradict in (
        ("labels", _labels_contradict),
        ("region_values", _regions_contradict),
        ("channels", _channels_contradict),
    ):
        if key not in given or key in settings:
            continue
        is_other = contradict(data, theirs)
        if not is_other and not _are_renamed(key, data, theirs):
            continue
        own, other = getattr(data, key), getattr(theirs, key)
        right, wrong = _shown(other, own), _shown(own, other)
        if is_other:
            # a setting is laid over as a whole: a part of the labels would be all
            typed = f"--set 'data.{key}={right}'" if right == _text(other) else f"--set data.{key}= and all of its own"
            raise ConfigError(
                f"{file}: is of other data: it says data.{key} {right}, but {data.path} says {wrong}; take the section "
                f"data out of the file, or, if the file is right, say so with {typed}"
            )
        log.warning("%s: data.%s %s is used, where %s says %s", file, key, right, data.path, wrong)


def _labels_contradict(data: Dataset, theirs: Dataset) -> bool:
    """Whether a name stands for something else than in the data set, or for a value that it does not name."""
    own, other = _values(data.labels or {}), _values(theirs.labels or {})
    if not own:
        return False
    folded = {name.casefold(): values for name, values in own.items()}
    for name, values in other.items():
        known = own.get(name, folded.get(name.casefold(), values))
        # a label may become the region around it
        if values != known and not (len(known) == 1 and known < values):
            return True
    # what a file wants to be ignored need not be named by the data set
    labelled = set().union(*(values for name, values in other.items() if name != IGNORE))
    return not labelled <= set().union(*own.values())


def _regions_contradict(data: Dataset, theirs: Dataset) -> bool:
    """Whether the same regions are written as other values."""
    own = _regions(data.labels or {})
    other = own if theirs.labels is None else _regions(theirs.labels)
    written = dict(zip(own, data.region_values)), dict(zip(other, theirs.region_values))
    return bool(data.region_values) and set(own) == set(other) and written[0] != written[1]


def _channels_contradict(data: Dataset, theirs: Dataset) -> bool:
    """Whether there are more or fewer, one is another of the data set's, or other ones hold Hounsfield units."""
    own, other = ([name.casefold() for name in d.channels] for d in (data, theirs))
    if not _names_channels(data):
        # one may be a file of several
        return 1 < len(own) != len(other)
    if len(own) != len(other) or list(map(is_ct, own)) != list(map(is_ct, other)):
        return True
    return any(was != name and name in own for was, name in zip(own, other))


def _are_renamed(key: str, data: Dataset, theirs: Dataset) -> bool:
    if key == "labels":
        return bool(data.labels) and _values(data.labels or {}) != _values(theirs.labels or {})
    return key == "channels" and _names_channels(data) and data.channels != theirs.channels


def _names_channels(data: Dataset) -> bool:
    return data.form in DESCRIBED and data.channels != NAMELESS


def _regions(labels: Labels) -> list[frozenset[int]]:
    """What each label or region stands for, in their order."""
    return [frozenset(members(value)) for name, value in labels.items() if name not in (BACKGROUND, IGNORE)]


def _as_sets(labels: Any) -> Any:
    """Labels as a file has them, equal where they mean the same; what is no mapping as it is."""
    if not isinstance(labels, Mapping):
        return labels
    named = ((name, value) for name, value in labels.items() if name != BACKGROUND)
    return {name: {*map(str, value)} if isinstance(value, list | tuple) else {str(value)} for name, value in named}


def _values(labels: Labels) -> dict[str, set[int]]:
    """What each label stands for, equal where it means the same."""
    return {name: set(members(value)) for name, value in labels.items() if name != BACKGROUND}


def _text(said: Any) -> str:
    return json.dumps(said, ensure_ascii=False)


def _shown(said: Any, other: Any) -> str:
    """All of it, or of many labels those that differ."""
    if len(_text(said)) <= MOST_SHOWN or not isinstance(said, dict):
        return _text(said)
    unlike = {name: value for name, value in said.items() if name not in other or other[name] != value}
    return f"{_text(unlike)[:-1][:MOST_SHOWN]}, …}}" if unlike else "nothing of it"


def read_labels(path: Path) -> Labels:
    """Names and values of labels, from a run folder, a name of `list_models`, a dataset.json or YAML (`name: value`).

    Raises `ConfigError`.
    """
    path = shipped_model(path, NAMING) or path
    file = path
    if path.is_dir():
        file = next((path / name for name in NAMING if (path / name).is_file()), path / "config.yaml")
    content = read_yaml(file)
    if file.name == "model.json" and isinstance(content.get("config"), dict):
        content = content["config"]
    found = content.get("data", content)
    found = found.get("labels", found) if isinstance(found, dict) else {}
    try:
        labels = label_values(found) if isinstance(found, dict) else {}
    except ValueError as error:
        raise ConfigError(f"{file}: {error}, such as liver: 1") from error
    if not labels:
        raise ConfigError(f"{file}: no labels found, expected names with values, such as liver: 1")
    return labels
