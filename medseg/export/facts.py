"""What a network alone does not tell and its user must know: labels, preprocessing, windows, whose it is."""

from __future__ import annotations

from typing import Any

from medseg.config import BACKGROUND
from medseg.export.agreement import Free
from medseg.model import Model
from medseg.versions import versions

SCHEMA_VERSION = 1


def facts(model: Model, free: Free) -> dict[str, Any]:
    """All that it takes to use the network without medseg, ready for JSON."""
    config = model.config
    turned = config.data.spatial_dims == 3 and config.preprocess.orient
    return {
        "schema_version": SCHEMA_VERSION,
        "medseg_version": versions("medseg")["medseg"],
        "model_sha256": model.sha256,
        "title": title(model),
        "licence": licence(model),
        "network": config.network.name,
        "channels": list(config.data.channels),
        "labels": output_channels(model),
        "decision": "every region whose logit is above 0; later ones are written over earlier ones"
        if config.data.is_regions
        else "the label with the largest logit",
        "orientation": "RAS" if turned else "as in the file",
        "preprocess": config.preprocess.model_dump(mode="json"),
        "steps": "orient, crop, resample to spacing_mm or shape; then by channel: clip, minus mean, divided by sd",
        "patch_size": list(config.windows.patch_size),
        "overlap": config.windows.overlap,
        "free": free,
        "postprocess": config.postprocess.model_dump(mode="json"),
    }


def output_channels(model: Model) -> list[dict[str, Any]]:
    """Name and written value of each channel of the logits."""
    data = model.config.data
    names = data.foreground if data.is_regions else (BACKGROUND, *data.foreground)
    return [{"name": name, "value": value} for name, value in zip(names, data.out_values)]


def licence(model: Model) -> str:
    """Under which terms the weights are."""
    return str(model.description.get("licence", "not stated"))


def title(model: Model) -> str:
    """What the model's card calls it; without a card its network and labels."""
    stated = model.description.get("card", {}).get("title")
    return str(stated or f"{model.config.network.name} for {', '.join(model.config.data.foreground)}")
