"""What a network alone does not tell and its user must know: labels, preprocessing, windows, whose it is."""

from __future__ import annotations

from typing import Any

import torch

from medseg.body import air_of
from medseg.config import BACKGROUND, Config, IntensityConfig, PreprocessConfig
from medseg.export.agreement import Free, min_shape
from medseg.model import Model
from medseg.versions import versions

SCHEMA_VERSION = 1
STEPS = (
    "orient; crop (nonzero: the outer planes in which every channel is 0); resample to spacing_mm or shape, by cubic "
    "convolution (a = -0.5) that is stretched where voxels become larger; then by channel clip, subtract mean, divide "
    "by sd, where null is that of the image itself (sd of the population; a constant channel becomes 0); then pad what "
    "is smaller than a window with 0 on both sides"
)
BACK = "probabilities are resampled linearly to the image's own grid, and decided there"


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
        "preprocess": _preprocess(config.preprocess),
        "steps": STEPS,
        "back": BACK,
        "patch_size": list(config.windows.patch_size),
        "min_shape": list(min_shape(model)),
        "overlap": config.windows.overlap,
        "windows": config.windows.model_dump(mode="json", include={"mode", "tile_size", "halo", "whole_voxels"}),
        "network_at_inference": network_at_inference(model),
        "skip_air": skips_air(config),
        "free": free,
        "postprocess": config.postprocess.model_dump(mode="json"),
    }


def mean_and_sd(how: IntensityConfig) -> tuple[float | None, float | None]:
    """What a channel is normalised by; None is the image's own."""
    if how.normalise == "image":
        return None, None
    return (how.mean, how.sd) if how.normalise == "fixed" else (0.0, 1.0)


def _preprocess(how: PreprocessConfig) -> dict[str, Any]:
    told = how.model_dump(mode="json")
    for channel, its in zip(told["intensity"], how.intensity):
        channel["mean"], channel["sd"] = mean_and_sd(its)
    return told


def skips_air(config: Config) -> bool:
    """Whether medseg takes windows of air for background without a look."""
    # of an image that is all body
    body = torch.full((len(config.data.channels), *(1,) * config.data.spatial_dims), torch.inf)
    return air_of(config.windows, config.data, config.preprocess, body) is not None


def network_at_inference(model: Model) -> dict[str, Any]:
    """Settings of the network that calibration chose for inference; what is exported is the network as trained."""
    chosen = model.description.get("inference", {}).get("windows", {}).get("settings", {}).get("network", {})
    trained = model.config.network.model_dump(mode="json")
    return {key: value for key, value in chosen.items() if value != trained[key]}


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
