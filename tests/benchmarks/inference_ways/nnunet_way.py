"""One measured process, in nnU-Net's own environment: nnUNetPredictor with its defaults, on a list of files.

Defaults: tiles at half a patch, Gaussian weights, mirroring, float32 (it has no reduced precision on a CPU), its own
reading, preprocessing, resampling of logits and export.
Job: `images`, `cases` (their names), `out`, `plans`, `dataset_json`, `network` (`own`: of the plans, random weights;
`ours`: of the model in `model`), `mirror_axes`, `workers` (0: `predict_from_files_sequential`), `record`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages import Stages, read_job


# everything is imported below: the workers that nnU-Net spawns import this file
def main() -> None:
    """Import, make the predictor, predict."""
    job = read_job()
    stages = Stages(Path(job["record"]))
    with stages.stage("import"):
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    with stages.stage("model"):
        dataset = json.loads(Path(job["dataset_json"]).read_text())
        plans = PlansManager(json.loads(Path(job["plans"]).read_text()))
        configuration = plans.get_configuration("3d_fullres")
        network = ours(job["model"]) if job["network"] == "ours" else own(configuration, dataset)
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        axes = tuple(job["mirror_axes"]) or None
        weights = [network.state_dict()]
        predictor.manual_initialization(network, plans, configuration, weights, dataset, "nnUNetTrainer", axes)
    _time_the_network(predictor, stages)
    Path(job["out"]).mkdir(parents=True, exist_ok=True)
    images = [[path] for path in job["images"]]
    outputs = [str(Path(job["out"]) / case) for case in job["cases"]]
    workers = job["workers"]
    stages.facts |= {"threads": torch.get_num_threads(), "workers": workers, "mirror_axes": axes}
    with stages.stage("cases"):
        if workers:
            predictor.predict_from_files(
                images, outputs, num_processes_preprocessing=workers, num_processes_segmentation_export=workers
            )
        else:
            predictor.predict_from_files_sequential(images, outputs)
    missing = [o for o in outputs if not Path(o + dataset["file_ending"]).is_file()]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(outputs)} masks are missing")
    stages.facts["n"] = len(outputs)
    stages.write()


def ours(folder: str) -> Any:
    """The network that medseg trained; it takes and gives what nnU-Net's does."""
    from medseg.model import read_model

    return read_model(Path(folder)).network.eval()


def own(configuration: Any, dataset: dict[str, Any]) -> Any:
    """The network of nnU-Net's plans, weights as drawn."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(0)
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        len(dataset["channel_names"]),
        len(dataset["labels"]),
        deep_supervision=False,
    )


def _time_the_network(predictor: Any, stages: Stages) -> None:
    inner = predictor.predict_logits_from_preprocessed_data

    def timed(data: Any) -> Any:
        with stages.stage("case.network"):
            return inner(data)

    predictor.predict_logits_from_preprocessed_data = timed


if __name__ == "__main__":
    main()
