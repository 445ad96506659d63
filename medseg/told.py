"""What a data set and a configuration each say of labels and channels: what holds, and where they may not differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.cases import Dataset
from medseg.catalogue import MODELS, model_names
from medseg.config import BACKGROUND, make_data_config, read_yaml
from medseg.errors import ConfigError
from medseg.metrics.codes import members

# forms whose description names channels; elsewhere they are called after columns or nothing
DESCRIBED = ("nnunet", "decathlon")
NAMELESS = ("image",)
# characters of labels that a message shows
MOST_SHOWN = 200


def told(data: Dataset, given: Mapping[str, Any], *, source: str = "--set") -> Dataset:
    """`data` with the labels, regions and channels of a `data` section that is laid over what it says.

    Raises `ConfigError` naming `source` where they are impossible.
    """
    section = make_data_config(
        spatial_dims=given.get("spatial_dims", 3),
        channels=given.get("channels", NAMELESS),
        labels=given.get("labels", {}),
        region_values=given.get("region_values", ()),
        source=source,
    )
    changes: dict[str, Any] = {key: getattr(section, key) for key in ("labels", "channels") if key in given}
    # regions without them have got some
    if section.region_values or "region_values" in given:
        changes["region_values"] = section.region_values
    return replace(data, **changes)


def refuse_other_data(data: Dataset, file: Path, given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the `data` section `given` in `file` contradicts what the data set itself says.

    What stands in `settings`, the section that was typed beside the file, is meant; so is what the data set leaves
    open.
    """
    nothing = Dataset(data.path, "nnunet", (), NAMELESS)
    theirs = told(nothing, given, source=str(file))
    here, there = _said(data), _said(theirs)
    for key, own in here.items():
        if key in settings or None in (own, there[key]) or own == there[key]:
            continue
        right, wrong = (
            _shown(getattr(theirs, key), getattr(data, key)),
            _shown(getattr(data, key), getattr(theirs, key)),
        )
        raise ConfigError(
            f"{file}: is of other data: it says data.{key} {right}, but {data.path} says {wrong}; take the section "
            f"data out of the file, or, if the file is right, say so with --set 'data.{key}={right}'"
        )


def _said(data: Dataset) -> dict[str, Any]:
    """What `data` says of labels, regions and channels, equal where it means the same; None: nothing."""
    values = {name: sorted(members(value)) for name, value in (data.labels or {}).items() if name != BACKGROUND}
    named = data.form in DESCRIBED and data.channels != NAMELESS
    return {
        "labels": values or None,
        "region_values": sorted(data.region_values) or None,
        "channels": [name.lower() for name in data.channels] if named else None,
    }


def _shown(said: Any, other: Any) -> str:
    text = json.dumps(said, ensure_ascii=False)
    if len(text) > MOST_SHOWN and isinstance(said, dict):
        # of many labels those that differ
        text = json.dumps({n: v for n, v in said.items() if n not in other or other[n] != v}, ensure_ascii=False)[:-1]
        text = f"{text[:MOST_SHOWN]}, …}}"
    return text


def read_labels(path: Path) -> dict[str, int | tuple[int, ...]]:
    """Names and values of labels, from a run folder, a name of `list_models`, a dataset.json or YAML (`name: value`).

    Raises `ConfigError`.
    """
    if not path.exists() and str(path) in model_names():
        path = MODELS / path
    file = path
    if path.is_dir():
        known = (path / name for name in ("config.yaml", "model.json", "dataset.json"))
        file = next((file for file in known if file.is_file()), path / "config.yaml")
    content = read_yaml(file)
    if file.name == "model.json" and isinstance(content.get("config"), dict):
        content = content["config"]
    found = content.get("data", content)
    found = found.get("labels", found) if isinstance(found, dict) else {}
    try:
        turned = _names_first(found) if isinstance(found, dict) else {}
        labels = {
            str(n): tuple(int(i) for i in v) if isinstance(v, (list, tuple)) else int(v) for n, v in turned.items()
        }
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: labels must be names with whole numbers, such as liver: 1 ({error})") from error
    if not labels:
        raise ConfigError(f"{file}: no labels found, expected names with values, such as liver: 1")
    return labels


def _names_first(labels: Mapping[Any, Any]) -> dict[Any, Any]:
    # the Decathlon writes "1": "liver"
    numbered = all(str(k).isdecimal() and isinstance(v, str) for k, v in labels.items())
    return {v: int(k) for k, v in labels.items()} if numbered else dict(labels)
