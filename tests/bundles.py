"""MONAI's own workflow on an exported bundle, and medseg's masks to set beside its."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import medseg
from medseg.infer import InferOptions

with_ignite = pytest.mark.skipif(find_spec("ignite") is None, reason="MONAI's evaluator needs pytorch-ignite")
# the image alone, in float32, as other programs see it
PLAIN = InferOptions(device="cpu", precision="32", tta="none", window="auto")


def monai_masks(folder: Path, images: Path, out: Path) -> dict[str, Path]:
    """The masks that MONAI's own workflow makes of the files in `images`, by the names of these."""
    import monai.bundle

    with warnings.catch_warnings():
        # torch calls TorchScript deprecated, MONAI warns of configurations from elsewhere
        warnings.simplefilter("ignore")
        monai.bundle.run(
            config_file=str(folder / "configs" / "inference.json"),
            bundle_root=str(folder),
            dataset_dir=str(images),
            output_dir=str(out),
            device="$torch.device('cpu')",
        )
    return {path.name: path for path in sorted(out.iterdir())}


def refused_by_monai(folder: Path, images: Path, out: Path) -> str:
    """What its workflow ends with, all causes of the error together."""
    with pytest.raises(RuntimeError) as caught:
        monai_masks(folder, images, out)
    found: BaseException | None = caught.value
    told = []
    while found is not None:
        told.append(str(found))
        found = found.__cause__
    return "\n".join(told)


def our_masks(model: str | Path, images: Path, out: Path) -> dict[str, Path]:
    """The masks that `medseg infer` makes of the files in `images`, by the names of these."""
    medseg.infer([images], [model], out, PLAIN)
    return {path.name: path for path in sorted(out.iterdir()) if path.name != "run.json"}
