"""One measured process: the way of MONAI's tutorials (spleen_segmentation_3d), with a network that medseg trained.

LoadImaged, EnsureChannelFirstd, Orientationd, Spacingd (bilinear), the same normalisation, DataLoader,
sliding_window_inference (Gaussian), then softmax, Invertd (scores, linear), argmax, SaveImaged.
`early_argmax`: labels are taken on the network's grid and inverted with nearest neighbour, which needs less memory and
is what is left where the way above does not fit; it is another result.

Job: `images`, `model`, `out`, `overlap`, `precision` (32 or bf16), `workers`, `early_argmax`, `record`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages import Stages, read_job


def main() -> None:
    """Import, read the model, do one case after the other."""
    job = read_job()
    stages = Stages(Path(job["record"]))
    with stages.stage("import"):
        import numpy as np
        import torch
        from monai.data import DataLoader, Dataset, decollate_batch
        from monai.inferers import sliding_window_inference
        from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, SaveImaged

        from medseg.model import read_model
    with stages.stage("model"):
        model = read_model(Path(job["model"]))
        network, config = model.network.eval(), model.config
    before = Compose(transforms_before(config))
    early = job["early_argmax"]
    softmax = Activationsd("pred", softmax=True)
    invert = Invertd("pred", transform=before, orig_keys="image", nearest_interp=early, to_tensor=True)
    argmax = AsDiscreted("pred", argmax=True)
    save = SaveImaged(
        "pred", output_dir=job["out"], output_postfix="", separate_folder=False, output_dtype=np.uint8, resample=False
    )
    after: list[tuple[str, Callable[[Any], Any]]] = [("softmax", softmax), ("invert", invert), ("argmax", argmax)]
    if early:
        after = [("argmax", argmax), ("invert", invert)]
    dataset = Dataset([{"image": path} for path in job["images"]], transform=before)
    stages.facts |= {"threads": torch.get_num_threads(), "workers": job["workers"]}
    with stages.stage("cases"), torch.no_grad():
        loader = iter(DataLoader(dataset, batch_size=1, num_workers=job["workers"]))
        for _ in range(len(dataset)):
            with stages.stage("case.read_and_preprocess"):
                batch = next(loader)
            with (
                stages.stage("case.network"),
                torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16"),
            ):
                batch["pred"] = sliding_window_inference(
                    batch["image"], config.windows.patch_size, 4, network, overlap=job["overlap"], mode="gaussian"
                )
            for item in decollate_batch(batch):
                done = item
                for name, transform in after:
                    with stages.stage(f"case.{name}"):
                        done = transform(done)
                with stages.stage("case.write"):
                    save(done)
    stages.facts["n"] = len(dataset)
    stages.write()


def transforms_before(config: Any) -> list[Any]:
    """From a file to what the network sees, with MONAI's own transforms and medseg's numbers."""
    from monai.transforms import (
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        ScaleIntensityRanged,
        Spacingd,
    )

    chain: list[Any] = [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
    ]
    if config.preprocess.spacing_mm is not None:
        chain.append(Spacingd("image", pixdim=config.preprocess.spacing_mm, mode="bilinear"))
    how = config.preprocess.intensity[0]
    if how.normalise == "image" and how.clip is None:
        chain.append(NormalizeIntensityd("image"))
    elif how.normalise == "fixed" and how.clip is not None:
        low, high = how.clip
        scaled = ((low - how.mean) / how.sd, (high - how.mean) / how.sd)
        chain.append(ScaleIntensityRanged("image", low, high, *scaled, clip=True))
    else:
        raise ValueError(f"no transform of MONAI's for {how}; expected z-score, or clip and fixed numbers")
    return chain


if __name__ == "__main__":
    main()
