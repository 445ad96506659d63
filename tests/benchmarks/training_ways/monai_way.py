"""One measured training: the way of MONAI's tutorials (spleen_segmentation_3d and its transforms).

CacheDataset (random transforms after the cached ones), DataLoader; UNet of 32 to 256 channels with two residual units
and batch norm, or SegResNet as in brats_segmentation_3d; DiceCELoss, AdamW with a cosine schedule that ends with the
time, batch 4; bf16 autocast where a few steps showed it to be the faster. Predictions: SlidingWindowInferer with a
quarter overlap.

Job: `training`, `validation` ([id, image, label]), `network` (unet, segresnet), `patch`, `classes`, `seconds`,
`threads`, `out` (folder), `result`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from clocked import Clock, read_job, tell
from monai.data import CacheDataset, DataLoader
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import SegResNet, UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)
from monai.utils import set_determinism

BATCH, RATE, TRIAL_STEPS = 4, 1e-3, 4
KEYS = ("image", "label")


def main() -> None:
    """Cache, train until the time is over, write a label map for each validation case."""
    job = read_job()
    torch.set_num_threads(job["threads"])
    set_determinism(0)
    clock = Clock()
    patch = tuple(job["patch"])
    batches = endless(job["training"], patch)
    trainer = Trainer(job["network"], job["classes"])
    trainer.choose_precision(next(batches))
    clock.ready()

    def step(batch: Any) -> int:
        trainer.step(batch, done=clock.training / job["seconds"])
        return len(batch["image"])

    clock.train(batches, step, job["seconds"])
    predict(trainer, job, patch)
    parameters = sum(p.numel() for p in trainer.network.parameters())
    tell(Path(job["result"]), clock.facts() | {"precision": trainer.precision, "parameters": parameters})


class Trainer:
    """Network, loss and optimizer."""

    def __init__(self, network: str, classes: int) -> None:
        self.network = build(network, classes)
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE)
        self.precision = "32"

    def choose_precision(self, batch: Any) -> None:
        """bf16 or float32, whichever takes a step faster; the weights stay as they are."""
        times = {}
        for self.precision in ("32", "bf16"):
            self.backward(batch)
            began = time.perf_counter()
            for _ in range(TRIAL_STEPS):
                self.backward(batch)
            times[self.precision] = time.perf_counter() - began
        self.precision = min(times, key=lambda name: times[name])

    def step(self, batch: Any, *, done: float) -> None:
        """One step; `done` is the share of the time that has passed."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * (1 + cos(pi * min(1.0, done))) / 2
        self.backward(batch)
        self.optimizer.step()

    def backward(self, batch: Any) -> None:
        """Fresh gradients of one batch."""
        self.network.train()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.network(batch["image"].as_tensor())
        self.loss(logits.float(), batch["label"].as_tensor()).backward()


def build(network: str, classes: int) -> UNet | SegResNet:
    """For volumes of one channel whose sides are multiples of 8."""
    if network == "unet":
        return UNet(3, 1, classes, channels=(32, 64, 128, 256), strides=(2, 2, 2), num_res_units=2, norm="batch")
    if network == "segresnet":
        # blocks_down and blocks_up are those of the tutorial too
        return SegResNet(3, init_filters=16, in_channels=1, out_channels=classes, dropout_prob=0.2)
    raise ValueError(f"network {network} found, expected unet or segresnet")


def endless(cases: list[list[str]], patch: tuple[int, ...]) -> Iterator[Any]:
    """Batches, epoch after epoch."""
    files = [{"image": image, "label": label} for _, image, label in cases]
    # nothing random comes before the crop, so all up to the padding is cached
    random = [
        RandSpatialCropd(KEYS, roi_size=patch, random_size=False),
        RandAffined(
            KEYS,
            prob=1.0,
            rotate_range=(0.35,) * 3,
            scale_range=(0.2,) * 3,
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
        ),
        RandFlipd(KEYS, prob=0.5, spatial_axis=0),
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        RandGaussianNoised("image", prob=0.3, std=0.1),
    ]
    data = CacheDataset(files, Compose([*loading(KEYS, patch).transforms, *random]), num_workers=1, progress=False)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)
    while True:
        yield from loader


def loading(keys: tuple[str, ...], patch: tuple[int, ...]) -> Compose:
    """From a file to a normalised volume of at least `patch`."""
    return Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            NormalizeIntensityd("image", channel_wise=True),
            SpatialPadd(keys, spatial_size=patch),
        ]
    )


def predict(trainer: Trainer, job: dict[str, Any], patch: tuple[int, ...]) -> None:
    """A label map on the image's own grid for each validation case."""
    trainer.network.eval()
    infer, prepare = SlidingWindowInferer(patch, sw_batch_size=4, overlap=0.25), loading(("image",), patch)
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    for case, image, _ in job["validation"]:
        original = nibabel.load(image)
        volume = prepare({"image": image})["image"].as_tensor()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=trainer.precision == "bf16"):
            labels = infer(volume[None], trainer.network)[0].argmax(0).numpy().astype(np.uint8)
        # the padding is put on both sides, half each
        first = [(large - small) // 2 for large, small in zip(labels.shape, original.shape)]
        inside = tuple(slice(f, f + size) for f, size in zip(first, original.shape))
        nibabel.save(nibabel.Nifti1Image(labels[inside], original.affine), out / f"{case}.nii.gz")


if __name__ == "__main__":
    main()
