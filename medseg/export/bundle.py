"""A trained model as a MONAI Bundle that needs no medseg: network, chain from files to masks, metadata, its card.

The network is TorchScript (`models/model.ts`): of all forms without code of ours it is the only one that MONAI's tools
load, though torch calls it deprecated; a `.pt2` of torch.export refuses `eval()`, which MONAI's evaluator calls. Its
weights are in `models/model.pt` too, where the specification wants them.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import torch

from medseg.config import Config, DataConfig, PostprocessConfig, PreprocessConfig, WindowsConfig
from medseg.errors import ConfigError
from medseg.export.agreement import Checked, Free, Logits, make_and_check, shapes_to_try
from medseg.export.facts import facts, licence, output_channels, title
from medseg.model import Model
from medseg.progress import Progress
from medseg.units import is_ct
from medseg.versions import versions
from medseg.writers import atomic_path, write_text

ZIP = ".zip"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
VERSION = "1.0.0"
# as many as medseg takes on a CPU
BATCH = 4
# MONAI's SlidingWindowInferer: a Gaussian of this share of the patch, as `windows.edge_weights`, but never below FLOOR
SIGMA, FLOOR = 0.125, 0.001
CAUTION = "No medical device: for research, with every mask looked at."
Json = dict[str, Any]


def check_bundle(output: Path) -> None:
    """Raises `ConfigError` where `output` is neither a new folder nor a zip file."""
    if output.suffix.lower() == ZIP and not output.is_dir():
        return
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        found = "a file" if output.is_file() else "a folder with something in it"
        raise ConfigError(f"{output}: {found} found, expected a new folder, or a file that ends in {ZIP}; change -o")


def write_bundle(model: Model, output: Path, progress: Progress) -> Checked[None]:
    """Write a bundle, whole or not at all, once the network that was saved and loaded back agrees with PyTorch.

    Raises `ConfigError` for signals, which MONAI's transforms of files do not read, `ModelError` with the figures where
    the networks do not agree.
    """
    if model.config.data.spatial_dims == 1:
        raise ConfigError(f"{output}: a model of signals (1D) found, which no bundle reads; use --to onnx")
    zipped, output = output.suffix.lower() == ZIP, output.resolve()
    name = output.stem if zipped else output.name
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name[:40]}.", dir=output.parent) as temporary:
        bundle = Path(temporary) / name
        checked = _write_network(model, bundle / "models", progress)
        for path, content in _texts(model, checked.free, name).items():
            write_text(bundle / path, content)
        if zipped:
            with atomic_path(output) as file, ZipFile(file, "w", ZIP_DEFLATED) as archive:
                for part in sorted(part for part in bundle.rglob("*") if part.is_file()):
                    archive.write(part, part.relative_to(temporary))
        else:
            bundle.replace(output)
    return checked


def _write_network(model: Model, folder: Path, progress: Progress) -> Checked[None]:
    folder.mkdir(parents=True)

    def make(free: Free) -> tuple[None, Logits]:
        with torch.no_grad(), warnings.catch_warnings():
            # that this is deprecated, and that a trace may not hold for other sizes: that is looked at below
            warnings.simplefilter("ignore")
            example = torch.zeros(shapes_to_try(model, free)[0])
            traced = torch.jit.trace(model.network, example, check_trace=False)  # type: ignore[no-untyped-call]
            # MONAI's `load_net_with_metadata` finds them there
            inside = {"metadata.json": _json(_metadata(model, free))}
            torch.jit.save(traced, folder / "model.ts", _extra_files=inside)
            _forget_paths(folder / "model.ts")
            loaded = torch.jit.load(folder / "model.ts", map_location="cpu")  # type: ignore[no-untyped-call]
        return None, loaded

    checked = make_and_check(model, make, name=folder.parent.name, progress=progress)
    torch.save({k: v.contiguous() for k, v in model.network.state_dict().items()}, folder / "model.pt")
    return checked


def _forget_paths(script: Path) -> None:
    """Leave out the lines of code that each step comes from: they tell the folders of this machine."""
    with ZipFile(script) as archive:
        parts = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    with ZipFile(script, "w") as archive:
        for name, content in parts.items():
            archive.writestr(ZipInfo(name), content)


def _texts(model: Model, free: Free, name: str) -> dict[str, str]:
    """The files beside the network, by their path."""
    return {
        "configs/metadata.json": _json(_metadata(model, free)),
        "configs/inference.json": _json(_inference(model.config, free)),
        "docs/README.md": _readme(model, name),
        "LICENSE": _licence_text(model),
    }


# ---- configs/inference.json


def _inference(config: Config, free: Free) -> Json:
    """The configuration that `python -m monai.bundle run` runs: from the files of `dataset_dir` to masks."""
    final = "torch.nn.Sigmoid()" if config.data.is_regions else "torch.nn.Softmax(dim=1)"
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "dataset_dir": "images",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        **_files(config),
        "network_def": {"_target_": "torch.jit.load", "f": "$@bundle_root + '/models/model.ts'", "map_location": "cpu"},
        # what windows share is the mean of probabilities, as in medseg
        "network": f"$torch.nn.Sequential(@network_def, {final}).to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(config)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': files} for files in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(config.windows.patch_size),
            "sw_batch_size": 1 if free == "nothing" else BATCH,
            "overlap": config.windows.overlap,
            "mode": "gaussian",
            "sigma_scale": SIGMA,
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(config.data, _ending(config))},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        # without files MONAI would end as if all were well
        "run": [f"$torch._assert(len(@datalist) > 0, 'no {_wanted(config)} in ' + @dataset_dir)", "$@evaluator.run()"],
    }


def _ending(config: Config) -> str:
    return ".png" if _of_pictures(config) else ".nii.gz"


def _is_numbered(config: Config) -> bool:
    """Whether the channels of a case lie in `CASE_0000`, `CASE_0001` and on; three of a picture are its colours."""
    count = len(config.data.channels)
    return count > 1 and not (count == 3 and _of_pictures(config))


def _wanted(config: Config) -> str:
    """The pattern that finds cases, by their only or first file."""
    return f"*{'_0000' if _is_numbered(config) else ''}{_ending(config)}"


def _files(config: Config) -> Json:
    """Which files make a case."""
    wanted, ending = _wanted(config), _ending(config)
    found = f"$sorted(glob.glob(os.path.join(@dataset_dir, '{wanted}')))"
    if not _is_numbered(config):
        return {"datalist": found}
    stem, channels = f"f[:-{len(wanted) - 1}]", f"range({len(config.data.channels)})"
    return {
        "first_channels": found,
        "datalist": f"$[[{stem} + '_%04d{ending}' % c for c in {channels}] for f in @first_channels]",
    }


def _preprocessing(config: Config) -> list[Json]:
    """What `preprocess.make_transforms` does, with MONAI's own transforms."""
    how, dims = config.preprocess, config.data.spatial_dims
    if _of_pictures(config):
        # grey of 16 bits stays as it is
        colours = len(config.data.channels) == 3
        mode, others = ("RGB", ("L", "LA", "P", "RGBA")) if colours else ("L", ("LA", "P", "RGB", "RGBA"))
        how_read = f"$lambda picture: picture.convert('{mode}') if picture.mode in {others} else picture"
        chain = [_step("LoadImaged", reader="PILReader", converter=how_read), _step("EnsureChannelFirstd")]
        # MONAI reads columns first
        chain.append(_step("Transposed", indices=[0, 2, 1]))
    else:
        chain = [_step("LoadImaged"), _step("EnsureChannelFirstd")]
    if how.orient and dims == 3:
        chain.append(_step("Orientationd", axcodes="RAS", labels=[["L", "R"], ["P", "A"], ["I", "S"]]))
    if how.crop == "nonzero":
        chain.append(_step("CropForegroundd", source_key="image", select_fn="$lambda image: image != 0"))
    if how.shape is not None:
        chain.append(_step("Resized", spatial_size=list(how.shape), mode="trilinear" if dims == 3 else "bilinear"))
    if how.spacing_mm is not None:
        chain.append(_step("Spacingd", pixdim=list(how.spacing_mm), mode="bilinear"))
    return [*chain, *_intensity(how, dims)]


def _intensity(how: PreprocessConfig, dims: int) -> list[Json]:
    """Clip each channel, subtract a mean and divide by a standard deviation: null is the image's own."""
    chain: list[Json] = []
    if any(channel.clip for channel in how.intensity):
        widest = torch.finfo(torch.float32)
        clips = [channel.clip or (widest.min, widest.max) for channel in how.intensity]
        low, high = (f"torch.tensor({list(ends)}).view(-1{', 1' * dims})" for ends in zip(*clips))
        chain.append(_step("Lambdad", func=f"$lambda image: image.clamp({low}, {high})"))
    own = {"image": (None, None), "none": (0.0, 1.0)}
    means, sds = zip(*(own.get(channel.normalise, (channel.mean, channel.sd)) for channel in how.intensity))
    chain.append(_step("NormalizeIntensityd", channel_wise=True, subtrahend=list(means), divisor=list(sds)))
    return chain


def _postprocessing(data: DataConfig, ending: str) -> list[Json]:
    """From probabilities to a mask on the file's own grid, probabilities being what is resampled."""
    chain = [_step("Invertd", "pred", transform="@preprocessing", orig_keys="image", nearest_interp=False)]
    values = data.out_values
    if data.is_regions:
        # the number of the last region that is there: later ones are written over earlier ones
        numbers = f"torch.arange(1, {len(values) + 1}, device=there.device).view(-1{', 1' * data.spatial_dims})"
        chain.append(_step("AsDiscreted", "pred", threshold=0.5))
        chain.append(_step("Lambdad", "pred", func=f"$lambda there: (there * {numbers}).amax(0, keepdim=True)"))
        values = (0, *values)
    else:
        chain.append(_step("AsDiscreted", "pred", argmax=True))
    kind = "$numpy.uint8" if max(values) <= 255 else "$numpy.uint16"
    if values != tuple(range(len(values))):
        # by numpy: torch has no lookup for uint16
        names = list(range(len(values)))
        chain.append(_step("MapLabelValued", "pred", orig_labels=names, target_labels=list(values), dtype=kind))
    saved = {"output_dir": "@output_dir", "output_ext": ending, "output_dtype": kind}
    return [*chain, _step("SaveImaged", "pred", **saved, output_postfix="", separate_folder=False, print_log=False)]


def _step(name: str, keys: str = "image", /, **arguments: Any) -> Json:
    return {"_target_": name, "keys": keys, **arguments}


def _of_pictures(config: Config) -> bool:
    """Whether the model is of pictures (rows and columns), not of planes with a size in mm."""
    return config.data.spatial_dims == 2 and config.preprocess.spacing_mm is None


# ---- configs/metadata.json and what people read


def _metadata(model: Model, free: Free) -> Json:
    config, card = model.config, dict(model.description.get("card", {}))
    known = versions("medseg", "monai", "torch", "numpy", "nibabel", "pytorch-ignite", "pillow")
    needed = ("pytorch-ignite", "pillow" if _of_pictures(config) else "nibabel")
    sizes = {"spatial_shape": list(config.windows.patch_size), "dtype": "float32", "is_patch_data": True}
    channels, outputs = config.data.channels, output_channels(model)
    ct = all(is_ct(channel) for channel in channels)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: f"exported by medseg {known['medseg']}"},
        "monai_version": known["monai"],
        "pytorch_version": known["torch"].partition("+")[0],
        "numpy_version": known["numpy"],
        "required_packages_version": {name: known[name] for name in needed},
        "name": title(model),
        "task": f"segmentation of {', '.join(config.data.foreground)}",
        "description": card.get("segments") or f"{config.network.name}, trained by medseg",
        "authors": "trained with medseg; see LICENSE for whose data it has learnt from",
        "copyright": licence(model),
        "data_source": card.get("data", "not stated"),
        "intended_use": card.get("intended_use", CAUTION),
        "eval_metrics": {f"mean_dice_{name}": figure["mean"] for name, figure in card.get("dice", {}).items()},
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if ct else "magnitude",
                    "modality": "CT" if ct else ", ".join(channels),
                    "num_channels": len(channels),
                    **sizes,
                    "value_range": [],
                    "channel_def": {str(n): name for n, name in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    # as the specification names channels of which the largest decides, and those that each decide
                    "format": "classes" if config.data.is_regions else "labels",
                    "num_channels": config.data.out_channels,
                    **sizes,
                    "value_range": [],
                    "channel_def": {str(n): channel["name"] for n, channel in enumerate(outputs)},
                }
            },
        },
        "medseg": facts(model, free),
    }


def _readme(model: Model, name: str) -> str:
    config, card = model.config, model.description.get("card", {})
    ending = _ending(config)
    files = f"holds `*{ending}`"
    if _is_numbered(config):
        files += f", of each case `CASE_0000{ending}`, `CASE_0001{ending}` and on: {', '.join(config.data.channels)}"
    segments = card.get("segments", ", ".join(config.data.foreground))
    rows = "\n".join(f"| {channel['value']} | {channel['name']} |" for channel in output_channels(model))
    limits = "\n".join(f"- {limit}" for limit in card.get("limits", [CAUTION]))
    return f"""# {title(model)}

Segments {segments}. A MONAI Bundle that medseg exported; it needs MONAI and pytorch-ignite, not medseg.

```
cd {name}
python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir MASKS
```

IMAGES {files}. `python -m monai.bundle` needs the package fire too. The masks' values:

| value | label |
| --- | --- |
{rows}

## Intended use

{card.get("intended_use", "Research.")}

{limits}

## How it differs from `medseg infer`

- The image alone is looked at, as with `--tta none`; no Dice is estimated.
- MONAI resamples linearly; medseg with a cubic kernel that is smooth where voxels become larger.
- {_windows_differ(config.windows)}
- The probabilities of all {config.data.out_channels} channels are brought back to the image's grid at once: memory.
{_postprocessing_differs(config.postprocess)}
- Files are read by MONAI, without medseg's checks of geometry, channels and units. {_files_differ(config)}

## Licence

{_licence_text(model)}"""


def _postprocessing_differs(how: PostprocessConfig) -> str:
    """Lines of what medseg does before and after probabilities become labels, and the bundle does not."""
    cleaning = {k: v for k, v in how.model_dump().items() if v and not k.startswith("crf")}
    line = f"- Masks are not cleaned{f'; medseg does it by {json.dumps(cleaning)}' if cleaning else ''}."
    if how.crf:
        line += "\n- Probabilities are not refined; medseg does it by a conditional random field (`postprocess.crf`)."
    return line


def _files_differ(config: Config) -> str:
    """What medseg reads, or writes, and the bundle does not."""
    if _of_pictures(config):
        three = ", the three channels in the colours of one" if len(config.data.channels) == 3 else ""
        return f"Pictures must be PNG{three}; colours of 16 bits are cut to 8."
    if config.data.spatial_dims == 2:
        return "A plane must be NIfTI of two axes: one of three, such as (I, J, 1), ends the run with an error."
    each = "Channels must lie in a file each, not in one of four axes. " if _is_numbered(config) else ""
    return f"Volumes must be NIfTI. {each}The mask of a volume of a single slice has two axes, not three."


def _windows_differ(windows: WindowsConfig) -> str:
    here = f"windows of a patch's size that share {windows.overlap:g} of it"
    weights = f"MONAI's Gaussian weights are {FLOOR:g} at least, medseg's have no floor"
    if windows.mode == "blend" and windows.tile_size in (None, windows.patch_size):
        return f"Both take {here}, but medseg spreads them evenly, MONAI moves the last one inwards; {weights}."
    size = " × ".join(map(str, windows.tile_size or windows.patch_size))
    there = {
        "blend": f"windows of {size} voxels",
        "halo": f"tiles of {size} voxels that see a margin around them",
        "whole": "the whole image at once where it fits",
    }[windows.mode]
    return f"medseg takes {there}; here {here} are averaged, by Gaussian weights that are {FLOOR:g} at least."


def _licence_text(model: Model) -> str:
    attribution = model.description.get("card", {}).get("attribution")
    return f"The weights: {licence(model)}\n" + (f"\n{attribution}\n" if attribution else "")


def _json(content: Json) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
