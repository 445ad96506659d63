"""One measured training: nnU-Net with its own fingerprint, plans, preprocessing, trainer and predictor.

Its trainer's own steps are taken one by one, an epoch's learning rate after every 250 of them as it does; the 50
validation batches of its epochs are left away, for they only make it slower. At each moment that the driver asks for,
on standard input, it trains on until then and predicts the validation cases with mirroring, as it does by default.
Runs in nnU-Net's environment.

Job: `dataset` (nnU-Net's form), `name` (Dataset004_Name), `fold`, `validation` ([id, image, label]), `threads`, `work`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from clocked import Clock, read_job, tell

CONFIGURATION = "3d_fullres"


def main() -> None:
    """Prepare, then train and predict as asked: each line is `seconds`, a folder and the file for the result."""
    job = read_job()
    torch.set_num_threads(job["threads"])
    clock = Clock()
    trainer = make_trainer(job)
    clock.ready()
    tell(Path(job["work"]) / "ready.json", {"preparing_s": round(clock.preparing, 2)})
    batches = epochs(trainer, clock)
    for line in sys.stdin:
        until, out, result = line.rstrip("\n").split("\t")
        clock.train(batches, lambda batch: take_step(trainer, batch), float(until))
        predict(trainer, job["validation"], Path(out))
        told = clock.facts() | {"batch_size": trainer.batch_size, "patch_size": list(map(int, patch_of(trainer)))}
        told["parameters"] = sum(p.numel() for p in trainer.network.parameters())
        tell(Path(result), told)


def make_trainer(job: dict[str, Any]) -> Any:
    """Fingerprint, plans, preprocessed data, the data set's own folds, and a trainer at its beginning."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.run.run_training import get_trainer_from_args

    number, folder = int(job["name"][7:10]), Path(nnUNet_raw) / job["name"]
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("imagesTr", "labelsTr", "dataset.json"):
        (folder / part).unlink(missing_ok=True)
        (folder / part).symlink_to((Path(job["dataset"]) / part).resolve())
    extract_fingerprints([number], num_processes=job["threads"], show_progress_bar=False)
    plan_experiments([number])
    preprocess([number], configurations=(CONFIGURATION,), num_processes=(job["threads"],), show_progress_bar=False)
    shutil.copy(Path(job["dataset"]) / "splits_final.json", Path(nnUNet_preprocessed) / job["name"])
    trainer = get_trainer_from_args(job["name"], CONFIGURATION, job["fold"], device=torch.device("cpu"))
    trainer.on_train_start()
    return trainer


def epochs(trainer: Any, clock: Clock) -> Iterator[Any]:
    """Batches; the learning rate goes down with each of its epochs."""
    while True:
        if clock.steps % trainer.num_iterations_per_epoch == 0:
            trainer.current_epoch = clock.steps // trainer.num_iterations_per_epoch
            trainer.on_train_epoch_start()
        yield next(trainer.dataloader_train)


def take_step(trainer: Any, batch: Any) -> int:
    """One step of its own; the samples it saw."""
    trainer.train_step(batch)
    return len(batch["data"])


def predict(trainer: Any, cases: list[list[str]], out: Path) -> None:
    """Label maps of `cases`, with its predictor as its own validation sets it up."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    out.mkdir(parents=True, exist_ok=True)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(use_mirroring=True, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [{k: v.clone() for k, v in trainer.network.state_dict().items()}],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    predictor.predict_from_files_sequential(
        [[image] for _, image, _ in cases], [str(out / case) for case, _, _ in cases]
    )
    trainer.network.train()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)


def patch_of(trainer: Any) -> Any:
    """The patch of its plans."""
    return trainer.configuration_manager.patch_size


if __name__ == "__main__":
    main()
