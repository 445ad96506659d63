"""The models that come with medseg: listed, and made small and described before they ship; catalogue.py finds them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import Field, PositiveInt, ValidationError
from safetensors.torch import save as save_safetensors

from medseg.catalogue import DESCRIPTION, MODELS, WEIGHTS, model_names
from medseg.config import Fraction, Section
from medseg.errors import ConfigError, ModelError
from medseg.model import Model, chosen_settings, read_description, read_model
from medseg.writers import atomic_path, write_text

log = logging.getLogger(__name__)

CARD = "card"
# bytes of the weights of a model that ships
LARGEST = 12_000_000
# the rounding of half precision may give so many voxels of a test image another label: a mask's Dice then changes in
# the third decimal at most, where the object fills half of the image
LARGEST_CHANGE = 1e-3
# seeded: a model that ships is the same whenever it is made
SEED = 0


class Figure(Section):
    """Mean Dice of a label over held-back cases, its 95 % interval from `low` to `high`, and the number of cases."""

    mean: Fraction
    low: Fraction
    high: Fraction
    cases: PositiveInt


class ModelCard(Section):
    """What one has to know before using a model; `dice` by label, each case judged by a model that never saw it."""

    title: str = Field(min_length=1)
    segments: str = Field(min_length=1)
    data: str = Field(min_length=1)
    origin: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    attribution: str = Field(min_length=1)
    intended_use: str = Field(min_length=1)
    limits: tuple[str, ...] = Field(min_length=1)
    dice: dict[str, Figure] = Field(min_length=1)
    judged: str = Field(min_length=1)
    """How the Dice was measured."""


@dataclass(frozen=True)
class ShippedModel:
    """A model that comes with medseg: `name` works where a run folder does. `size` in bytes."""

    name: str
    folder: Path
    card: ModelCard
    size: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        about = {"name": self.name, "folder": str(self.folder), "bytes": self.size, "sha256": self.sha256}
        return about | self.card.model_dump(mode="json")


def list_models(folder: Path = MODELS) -> tuple[ShippedModel, ...]:
    """The models that come with medseg, by name. Raises `ModelError` for one that is damaged."""
    return tuple(_shipped(folder / name) for name in model_names(folder))


def make_card(values: Mapping[str, Any], *, source: str) -> ModelCard:
    """A checked card. Raises `ConfigError` naming `source` and what is missing, unknown or wrong."""
    try:
        return ModelCard.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise ConfigError(f"{source}: no model card: {wrong}") from error


def ship_model(run: Path, out: Path, card: ModelCard, *, like: Sequence[Path] = ()) -> ShippedModel:
    """Write the model of a run folder into `out`, small enough to ship: kernels in half precision, and its card.

    Norms, biases and statistics stay as they are. What the rounding changes is measured on an image of noise and
    written down. `like`: run folders of the same recipe that held cases back, as the folds of a cross-validation do. A
    run that held none back gets the windows and copies that they chose, and the estimate of Dice that the first of them
    learnt. Raises `ModelError` for a model that changes or weighs too much, `ConfigError` for a card that does not have
    the model's labels.
    """
    model, description = read_model(run), read_description(run)
    labels = set(model.config.data.foreground)
    if set(card.dice) != labels:
        raise ConfigError(
            f"{run}: its labels are {', '.join(sorted(labels))}, the card has Dice of {', '.join(sorted(card.dice))}"
        )
    content = save_safetensors(halved(model.network))
    if len(content) > LARGEST:
        raise ModelError(f"{run}: {len(content):,} bytes of weights in half precision, expected at most {LARGEST:,}")
    # the names of cases, and where their files lay, are nobody's business
    training = {k: v for k, v in description["training"].items() if k not in ("validation_cases", "command")}
    made = description | {
        "training": training,
        "licence": card.licence,
        "inference": description.get("inference") or _choices_of(like),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        CARD: card.model_dump(mode="json"),
    }
    change = _change(model, _read_back(content, made))
    if change["voxels_of_another_label"] > LARGEST_CHANGE:
        raise ModelError(
            f"{run}: half precision gives {change['voxels_of_another_label']:.2%} of the voxels of a test image "
            f"another label, expected at most {LARGEST_CHANGE:.1%}; its weights are of very different sizes"
        )
    with atomic_path(out / WEIGHTS) as temporary:
        temporary.write_bytes(content)
    _describe(out, made | {"half_precision": change})
    return _shipped(out)


def halved(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a network with its kernels as float16, but for those with numbers that float16 does not hold."""
    found: dict[str, torch.Tensor] = {}
    largest = torch.finfo(torch.float16).max
    for name, tensor in network.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        kernel = value.ndim > 2 and value.dtype == torch.float32 and bool((value.abs() <= largest).all())
        found[name] = value.half() if kernel else value
    return found


def _choices_of(runs: Sequence[Path]) -> dict[str, Any]:
    if not runs:
        return {}
    chosen = {name: {"settings": chosen_settings(runs, (name,)), "measured": []} for name in ("windows", "tta")}
    learnt = {key: value for key, value in read_description(runs[0]).get("inference", {}).items() if key == "quality"}
    return chosen | learnt


def _read_back(content: bytes, description: Mapping[str, Any]) -> Model:
    """The model as whoever installs it will have it; a folder that is there already is not touched."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / WEIGHTS).write_bytes(content)
        _describe(folder, description)
        return read_model(folder)


def _describe(folder: Path, description: Mapping[str, Any]) -> None:
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def _change(before: Model, after: Model) -> dict[str, float]:
    """What rounding does to the answer for one patch of seeded noise."""
    config = before.config
    shape = (1, len(config.data.channels), *config.windows.patch_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        exact, rounded = before.network(images), after.network(images)
    labels = [scores > 0 if config.data.is_regions else scores.argmax(dim=1) for scores in (exact, rounded)]
    return {
        "largest_difference_of_logits": float((exact - rounded).abs().max()),
        "largest_logit": float(exact.abs().max()),
        "voxels_of_another_label": float((labels[0] != labels[1]).float().mean()),
    }


def _shipped(folder: Path) -> ShippedModel:
    description = read_description(folder)
    try:
        card = ModelCard.model_validate(description.get(CARD, {}))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ModelError(
            f"{folder / DESCRIPTION}: `{CARD}.{where}` is missing or damaged; install medseg again"
        ) from error
    sha256 = str(description.get("weights_sha256"))
    return ShippedModel(folder.name, folder, card, (folder / WEIGHTS).stat().st_size, sha256)
