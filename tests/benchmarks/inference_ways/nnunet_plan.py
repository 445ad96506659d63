"""nnU-Net's own plans for a data set, made by its own planner, and two versions of them for the measurement.

`own.json`: its plans as they are, but with fewer features in every stage, so that the network's multiply-adds per
voxel are those of ours. `ours.json`: its plans with the spacing, patch, axis order and normalisation of our model, so
that our network sees in nnU-Net what it was trained to see.
Job: `dataset` (nnU-Net folder), `name` (Dataset004_Name), `model`, `out`, `record`. Runs in nnU-Net's environment.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from stages import Stages, read_job

# multiply-adds of the two networks may differ by this share
TOLERANCE = 0.10


def main() -> None:
    """Fingerprint, plan, fit the features, write."""
    job = read_job()
    stages = Stages(Path(job["record"]))
    from nnunetv2.paths import nnUNet_raw

    folder = Path(nnUNet_raw) / job["name"]
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("imagesTr", "labelsTr", "dataset.json"):
        link = folder / part
        link.unlink(missing_ok=True)
        link.symlink_to((Path(job["dataset"]) / part).resolve())
    plans = _plan(int(job["name"][7:10]))
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)

    from medseg.model import read_model

    dataset = json.loads((folder / "dataset.json").read_text())
    model = read_model(Path(job["model"]))
    patch = tuple(model.config.windows.patch_size)
    target = multiply_adds(model.network, patch) / _product(patch)
    own, facts = with_equal_work(plans, dataset, target)
    (out / "plans.json").write_text(json.dumps(plans, indent=1))
    (out / "own.json").write_text(json.dumps(own, indent=1))
    (out / "ours.json").write_text(json.dumps(like_our_model(plans, model.config), indent=1))
    (out / "dataset.json").write_text(json.dumps(dataset, indent=1))
    facts["config"] = json.loads((Path(job["model"]) / "model.json").read_text())["config"]
    facts["ours"] = {
        "patch_size": list(patch),
        "multiply_adds_per_voxel": round(target),
        "giga_multiply_adds_per_patch": round(target * _product(patch) / 1e9, 3),
        "parameters": sum(p.numel() for p in model.network.parameters()),
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
    stages.write()


def _plan(number: int) -> dict[str, Any]:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    name = convert_id_to_dataset_name(number)
    folder = Path(nnUNet_preprocessed) / name
    folder.mkdir(parents=True, exist_ok=True)
    extract_fingerprints([number], num_processes=2, show_progress_bar=False)
    plan_experiments([number])
    plans: dict[str, Any] = json.loads((folder / "nnUNetPlans.json").read_text())
    return plans


def with_equal_work(
    plans: dict[str, Any], dataset: dict[str, Any], target: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`plans` with the features that come closest to `target` multiply-adds per voxel, and what they are.

    Raises `ValueError` where none is within the tolerance.
    """
    from nnunet_way import own
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    found: dict[int, tuple[float, dict[str, Any], Any]] = {}
    for features in range(2, 65):
        changed = copy.deepcopy(plans)
        arguments = changed["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        stages = arguments["n_stages"]
        arguments["features_per_stage"] = [min(320, features * 2**n) for n in range(stages)]
        configuration = PlansManager(changed).get_configuration("3d_fullres")
        patch = tuple(int(p) for p in configuration.patch_size)
        network = own(configuration, dataset)
        work = multiply_adds(network, patch) / _product(patch)
        found[features] = (work, changed, network)
        if work > target * (1 + TOLERANCE):
            break
    best = min(found, key=lambda f: abs(found[f][0] / target - 1))
    work, changed, network = found[best]
    if abs(work / target - 1) > TOLERANCE:
        raise ValueError(f"{best} features need {work:.0f} multiply-adds per voxel, expected {target:.0f} within 10 %")
    arguments = changed["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    patch = changed["configurations"]["3d_fullres"]["patch_size"]
    original = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"]
    own_facts = {
        "patch_size": patch,
        "features_per_stage": arguments["features_per_stage"],
        "features_per_stage_of_its_plans": original,
        "multiply_adds_per_voxel": round(work),
        "giga_multiply_adds_per_patch": round(work * _product(patch) / 1e9, 3),
        "parameters": sum(p.numel() for p in network.parameters()),
        "work_against_ours": round(work / target, 3),
    }
    return changed, {"own": own_facts}


def like_our_model(plans: dict[str, Any], config: Any) -> dict[str, Any]:
    """`plans` that prepare images as our model expects them: axes i, j, k of RAS, its spacing, its patch."""
    changed = copy.deepcopy(plans)
    configuration = changed["configurations"]["3d_fullres"]
    # this reader turns to RAS and gives k, j, i
    changed |= {
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
    }
    configuration["patch_size"] = list(config.windows.patch_size)
    if config.preprocess.spacing_mm is not None:
        configuration["spacing"] = list(config.preprocess.spacing_mm)
    how = config.preprocess.intensity[0]
    if how.normalise == "fixed":
        configuration["normalization_schemes"] = ["CTNormalization"]
        numbers = {"mean": how.mean, "std": how.sd, "percentile_00_5": how.clip[0], "percentile_99_5": how.clip[1]}
        changed["foreground_intensity_properties_per_channel"]["0"] |= numbers
    else:
        configuration["normalization_schemes"] = ["ZScoreNormalization"]
    configuration["use_mask_for_norm"] = [False]
    return changed


def multiply_adds(network: Any, patch: tuple[int, ...]) -> float:
    """Of one forward pass over a patch of one channel, as torch counts them in convolutions and matrix products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, *patch))
    return counter.get_total_flops() / 2


def _product(numbers: Any) -> float:
    result = 1.0
    for number in numbers:
        result *= float(number)
    return result


if __name__ == "__main__":
    main()
