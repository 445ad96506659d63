"""A trained model: network, configuration, labels; written to and read from a folder without pickle or code."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from medseg.catalogue import BEST, CROSSVAL, DESCRIPTION, WEIGHTS
from medseg.config import COLOURS, Config, DataConfig, Section, make_config, overlay
from medseg.errors import ConfigError, ModelError
from medseg.networks import at_output_stride, build_network, check_settings
from medseg.readers import file_sha256
from medseg.state import STATE
from medseg.versions import versions
from medseg.writers import atomic_path, write_text

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

# what may be changed in a trained model: whole sections, or the keys that keep the meaning of its weights
CHANGEABLE: dict[str, tuple[str, ...]] = {
    "network": ("output_stride", "aspp_rates", "pooling_window"),
    "postprocess": (),
    "windows": (),
}

# packages whose version decides a result
DECISIVE = ("medseg", "torch", "monai", "numpy")


@dataclass(frozen=True)
class Model:
    """A network with what is needed to use it. `description` is what model.json says beside the configuration."""

    network: torch.nn.Module
    config: Config
    sha256: str
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label_names(self) -> dict[int, str]:
        """Name of every value that the model writes."""
        return label_names(self.config.data)


def label_names(data: DataConfig) -> dict[int, str]:
    """Name of every value in an output mask, background left out."""
    values = data.out_values if data.is_regions else data.out_values[1:]
    return dict(zip(values, data.foreground))


def label_table(data: DataConfig) -> list[dict[str, Any]]:
    """Name, value and colour of every label."""
    return [
        {"name": name, "value": value, "colour": COLOURS[n % len(COLOURS)]}
        for n, (value, name) in enumerate(label_names(data).items())
    ]


def new_network(config: Config) -> torch.nn.Module:
    """A fresh network for a configuration."""
    return build_network(
        config.network,
        spatial_dims=config.data.spatial_dims,
        in_channels=len(config.data.channels),
        out_channels=config.data.out_channels,
    )


def save_model(
    network: torch.nn.Module, config: Config, folder: Path, *, training: Mapping[str, Any], licence: str
) -> None:
    """Write model.safetensors and model.json into `folder`, each whole or not at all."""
    with atomic_path(folder / WEIGHTS) as temporary:
        temporary.write_bytes(_packed(network))
    description = {
        "schema_version": SCHEMA_VERSION,
        "labels": label_table(config.data),
        "training": dict(training),
        "licence": licence,
        "versions": versions(*DECISIVE),
        "weights_sha256": file_sha256(folder / WEIGHTS),
        "config": config.model_dump(mode="json"),
    }
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def is_complete(network: torch.nn.Module, config: Config, folder: Path, *, judged_by: str) -> bool:
    """Whether the model in `folder` is this very network, with what was chosen for its inference.

    `judged_by`: SHA-256 of the held-back cases, by whose labels it was chosen.
    """
    if not all((folder / name).is_file() for name in (DESCRIPTION, WEIGHTS)):
        return False
    try:
        description = read_description(folder)
    except ModelError as error:
        log.warning("%s; it is written anew", error)
        return False
    return (
        "inference" in description
        and description.get("config") == config.model_dump(mode="json")
        and description.get("training", {}).get("validation_sha256") == judged_by
        and description.get("weights_sha256") == hashlib.sha256(_packed(network)).hexdigest()
        and file_sha256(folder / WEIGHTS) == description["weights_sha256"]
    )


def _packed(network: torch.nn.Module) -> bytes:
    packed: bytes = save_safetensors({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()})
    return packed


def record_choices(folder: Path, choices: Mapping[str, Any]) -> None:
    """Add to the model in `folder` what was chosen for inference on held-back cases; see `calibrate`."""
    description = read_description(folder) | {"inference": dict(choices)}
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def chosen_settings(folders: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
    """The settings that calibration chose for the models in `folders`, of its choices those in `names`.

    Of an ensemble the copies that most of its models chose, mirrored along no axis that one of them does not know
    mirrored, and of all else what is the same for all. Raises `ModelError`.
    """
    made: list[Any] = []
    inference = [_read_choices(folder) for folder in folders]
    for name in names:
        found = [choices[name].settings for choices in inference if name in choices]
        if found and len(found) == len(folders):
            made.append(_usual(found) if name == "tta" else _common(found))
    settings = overlay({}, *made)
    if len(folders) > 1 and settings.get("windows", {}).get("flip_axes"):
        known = known_mirrored([_config_of(folder, read_description(folder)) for folder in folders])
        axes = [axis for axis in settings["windows"]["flip_axes"] if axis in known]
        settings = overlay(settings, {"windows": {"flip_axes": axes}})
    return settings


def known_mirrored(configs: Sequence[Config]) -> tuple[int, ...]:
    """The axes along which all models of these configurations have seen mirrored images while they were trained."""
    first, *others = (config.augment.flip_axes if config.augment.p_flip > 0 else () for config in configs)
    return tuple(axis for axis in first if all(axis in axes for axes in others))


def check_choices(folder: Path, settings: Mapping[str, Any], source: str | None = None) -> None:
    """Raises `ModelError` where the settings that were chosen for the model in `folder` do not fit it.

    `source`: where they stand; left out, what calibration wrote into model.json.
    """
    try:
        changed(_config_of(folder, read_description(folder)), settings)
    except ConfigError as error:
        raise ModelError(
            f"{source or f'{folder / DESCRIPTION}: `inference`'} does not fit the model ({error}); copy it again"
        ) from error


class Best(Section):
    """What a cross-validation chose for new cases: run folders below its own, to be averaged, and their settings."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1]
    models: tuple[str, ...] = Field(min_length=1)
    settings: dict[str, dict[str, Any]]


def read_best(folder: Path) -> Best | None:
    """The choice of the cross-validation in `folder`; None where none is there, or the folder is itself a model's.

    Raises `ModelError` where it is damaged, names something outside the folder, or has no choice yet.
    """
    file = folder / BEST
    if (folder / DESCRIPTION).exists():
        if file.is_file():
            raise ModelError(
                f"{folder}: holds a training run ({DESCRIPTION}) and a cross-validation ({BEST}), so that it is open "
                "which is meant; move one of them elsewhere"
            )
        return None
    if not file.is_file():
        if (folder / CROSSVAL).is_file():
            raise ModelError(
                f"{folder}: a cross-validation without {BEST}: a fold is missing or has failed; repeat its "
                "`medseg-crossval`, or give one of the run folders in it"
            )
        return None
    try:
        best = Best.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else str(error)
        raise ModelError(
            f"{file}: is damaged ({where or 'no JSON'}); repeat its `medseg-crossval`, which writes it anew"
        ) from error
    for n, model in enumerate(best.models):
        if not _lies_below(model):
            raise ModelError(f"{file}: model {model!r}, expected the path of a run folder below {folder}")
        if model in best.models[:n]:
            raise ModelError(f"{file}: model {model!r} is there twice; repeat its `medseg-crossval`")
    return best


def _lies_below(path: str) -> bool:
    # as on Windows too: a folder comes from anywhere
    return not PureWindowsPath(path).anchor and ".." not in PureWindowsPath(path).parts


class _Choice(Section):
    """One choice of calibration as it stands in model.json; what it was measured by is not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)


def _read_choices(folder: Path) -> dict[str, _Choice]:
    try:
        return TypeAdapter(dict[str, _Choice]).validate_python(read_description(folder).get("inference", {}))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ModelError(
            f"{folder / DESCRIPTION}: `inference.{where}` is damaged; copy the run folder again"
        ) from error


def _usual(found: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """The settings that more than half have: a moved copy that helped most models is no risk for the others."""
    settings: dict[str, Any] = {}
    for section in sorted({section for each in found for section in each}):
        values = [each.get(section, {}) for each in found]
        for key in sorted({key for value in values for key in value}):
            there = [value[key] for value in values if key in value]
            most = max(there, key=there.count)
            if 2 * there.count(most) > len(found):
                settings.setdefault(section, {})[key] = most
    return settings


def _common(found: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """The settings that are the same for all; of limits and sizes, which never are, the smallest."""
    smallest: dict[str, Callable[[Any], Any]] = {"whole_voxels": min, "min_size_mm3": _smallest_sizes}
    settings: dict[str, Any] = {}
    for section in found[0]:
        values = [settings_of.get(section, {}) for settings_of in found]
        for key in values[0]:
            if not all(key in v for v in values):
                return {}
            each = [v[key] for v in values]
            if key not in smallest and any(e != each[0] for e in each):
                return {}
            settings.setdefault(section, {})[key] = each[0] if all(e == each[0] for e in each) else smallest[key](each)
        if any(set(v) != set(values[0]) for v in values):
            return {}
    return settings if all(set(f) == set(found[0]) for f in found) else {}


def _smallest_sizes(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: min(sizes[name] for sizes in each) for name in each[0] if all(name in sizes for sizes in each)}


def read_model(folder: Path, changes: Mapping[str, Any] | None = None) -> Model:
    """The model in a run folder, on the CPU, ready to infer; `changes` to its settings as for `changed`.

    Raises `ModelError` naming what is missing or damaged, `ConfigError` for changes that it cannot have.
    """
    description = read_description(folder)
    config = changed(_config_of(folder, description), changes or {})
    try:
        network = new_network(config)
    except ConfigError as error:
        if changes:
            raise
        raise ModelError(f"{folder / DESCRIPTION}: no usable configuration: {error}") from error
    digest = _load_weights(network, folder / WEIGHTS, changes or {})
    if description.get("weights_sha256") != digest:
        raise ModelError(
            f"{folder / WEIGHTS}: not the weights that {DESCRIPTION} describes (SHA-256 {digest[:12]}… found, "
            f"{str(description.get('weights_sha256'))[:12]}… expected); copy the whole run folder again"
        )
    return Model(network.eval(), config, digest, {k: v for k, v in description.items() if k != "config"})


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The settings of a trained model with `changes` laid over, of the sections that do not decide what it learnt.

    Another `network.output_stride` takes the rates along, so that the network sees what it was trained to see. Raises
    `ConfigError`.
    """
    if not changes:
        return config
    wrong = _unchangeable(changes)
    if wrong:
        may = ", ".join(f"{s}.{k}" for s, keys in CHANGEABLE.items() for k in keys or ("…",))
        raise ConfigError(f"--set {wrong[0]}: belongs to what a trained model has learnt; expected one of {may}")
    network = changes.get("network", {})
    stride = network.get("output_stride", config.network.output_stride)
    made = make_config(overlay(config.model_dump(mode="json"), changes), source="--set")
    if stride == config.network.output_stride:
        return made
    moved = at_output_stride(config.network, made.network.output_stride, spatial_dims=config.data.spatial_dims)
    if "aspp_rates" in network:
        moved = moved.model_copy(update={"aspp_rates": made.network.aspp_rates})
    return made.model_copy(update={"network": moved})


def trained_config(folder: Path) -> Config:
    """The configuration of the model in a run folder; its weights are not read. Raises `ModelError`."""
    return _config_of(folder, _read_json(folder))


def _config_of(folder: Path, description: Mapping[str, Any]) -> Config:
    if description.get("schema_version") != SCHEMA_VERSION:
        raise ModelError(
            f"{folder / DESCRIPTION}: schema_version {description.get('schema_version')!r} found, expected "
            f"{SCHEMA_VERSION}; use the version of medseg that wrote it ({description.get('versions')})"
        )
    try:
        config = make_config(description["config"], source=str(folder / DESCRIPTION))
        check_settings(config.network)
    except (KeyError, ConfigError) as error:
        raise ModelError(f"{folder / DESCRIPTION}: no usable configuration: {error}") from error
    return config


def _unchangeable(changes: Mapping[str, Any]) -> list[str]:
    given = [(section, key) for section, values in changes.items() for key in values]
    return [f"{s}.{k}" for s, k in given if s not in CHANGEABLE or (CHANGEABLE[s] and k not in CHANGEABLE[s])]


def read_description(folder: Path) -> dict[str, Any]:
    """What model.json in a model folder says, not checked. Raises `ModelError` where a file is missing or damaged."""
    if folder.is_file():
        raise ModelError(f"{folder}: a file, expected the folder that `medseg train -o` wrote, such as {folder.parent}")
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; a model is the folder that `medseg train -o` wrote")
    state, *parts = ((folder / name).is_file() for name in (STATE, DESCRIPTION, WEIGHTS))
    if state and not any(parts):
        raise ModelError(f"{folder}: its training has not ended ({STATE}, no {DESCRIPTION}); go on with --resume")
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name} found; a model folder holds {DESCRIPTION} and {WEIGHTS}")
    return _read_json(folder)


def _read_json(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / DESCRIPTION}: is not valid JSON ({error}); copy the run folder again") from error
    if not isinstance(description, dict):
        raise ModelError(f"{folder / DESCRIPTION}: holds {type(description).__name__}, expected an object")
    return description


def _load_weights(network: torch.nn.Module, path: Path, changes: Mapping[str, Any]) -> str:
    try:
        content = path.read_bytes()
        found = load_safetensors(content)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}); copy the run folder again") from error
    expected = network.state_dict()
    wrong = [k for k in expected if k not in found or found[k].shape != expected[k].shape]
    extra = [k for k in found if k not in expected]
    if wrong or extra:
        first = wrong[0] if wrong else extra[0]
        shape = tuple(found[first].shape) if first in found else "nothing"
        needs = tuple(expected[first].shape) if first in expected else "nothing"
        what = "weights of another network"
        if "network" in changes:
            what = f"these weights do not fit a network with {json.dumps(changes['network'])}"
        raise ModelError(
            f"{path}: {what}: {len(wrong)} of {len(expected)} tensors missing or of other shape, "
            f"{len(extra)} unknown; first `{first}`: {shape} found, {needs} expected"
        )
    network.load_state_dict(found)
    return hashlib.sha256(content).hexdigest()
