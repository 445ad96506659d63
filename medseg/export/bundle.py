"""A trained model as a MONAI Bundle that needs no medseg: network, chain from files to masks, metadata, its card.

The network is TorchScript (`models/model.ts`): of all forms without code of ours it is the only one that MONAI's tools
load, though torch calls it deprecated; a `.pt2` of torch.export refuses `eval()`, which MONAI's evaluator calls. Its
weights are in `models/model.pt` too, where the specification wants them.
"""

from __future__ import annotations

import io
import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import torch

from medseg.config import Config, DataConfig, PostprocessConfig, PreprocessConfig, WindowsConfig
from medseg.errors import ConfigError
from medseg.export.agreement import Checked, Free, Logits, make_and_check, shapes_to_try
from medseg.export.facts import (
    facts,
    licence,
    mean_and_sd,
    network_at_inference,
    output_channels,
    skips_air,
    title,
)
from medseg.export.outputs import METADATA, ZIP
from medseg.model import Model
from medseg.progress import Progress
from medseg.units import is_ct
from medseg.versions import versions
from medseg.windows import ALIGNMENT
from medseg.writers import all_or_none, atomic_path

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
VERSION = "1.0.0"
# as many as medseg takes on a CPU
BATCH = 4
# MONAI's SlidingWindowInferer: a Gaussian of this share of the patch, as `windows.edge_weights`, but never below FLOOR
SIGMA, FLOOR = 0.125, 0.001
CAUTION = "No medical device: for research, with every mask looked at."
Json = dict[str, Any]
_FOLDERS = ("configs", "docs", "models")


def write_bundle(model: Model, output: Path, progress: Progress) -> Checked[bytes]:
    """Write a bundle, whole or not at all, once the network that was packed and loaded back agrees with PyTorch.

    Raises `ConfigError` for signals, which MONAI's transforms of files do not read, `ModelError` with the figures where
    the networks do not agree.
    """
    if model.config.data.spatial_dims == 1:
        raise ConfigError(f"{output}: a model of signals (1D) found, which no bundle reads; use --to onnx")
    zipped, output = output.suffix.lower() == ZIP, output.resolve()
    name = output.stem if zipped else output.name
    checked = make_and_check(model, lambda free: _script(model, free), name=name, progress=progress)
    files = {
        **{path: text.encode(errors="backslashreplace") for path, text in _texts(model, checked.free, name).items()},
        "models/model.ts": checked.made,
        "models/model.pt": _weights(model),
    }
    if zipped:
        with atomic_path(output) as temporary:
            temporary.write_bytes(_zip({f"{name}/{path}": content for path, content in sorted(files.items())}))
    else:
        _write_folder(output, files)
    return checked


def _script(model: Model, free: Free) -> tuple[bytes, Logits]:
    """The network as TorchScript, and what that gives once it is loaded."""
    with torch.no_grad(), warnings.catch_warnings():
        # that this is deprecated, and that a trace may not hold for other sizes: that is looked at by the caller
        warnings.simplefilter("ignore")
        example, packed = torch.zeros(shapes_to_try(model, free)[0]), io.BytesIO()
        traced = torch.jit.trace(model.network, example, check_trace=False)  # type: ignore[no-untyped-call]
        # MONAI's `load_net_with_metadata` finds them there
        inside = {"metadata.json": _json(_metadata(model, free))}
        torch.jit.save(traced, packed, _extra_files=inside)
        script = _without_paths(packed)
        loaded = torch.jit.load(io.BytesIO(script), map_location="cpu")  # type: ignore[no-untyped-call]
    return script, loaded


def _without_paths(script: io.BytesIO) -> bytes:
    """Leave out the lines of code that each step comes from: they tell the folders of this machine."""
    with ZipFile(script) as archive:
        parts = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    return _zip(parts, ZIP_STORED)


def _texts(model: Model, free: Free, name: str) -> dict[str, str]:
    """The files beside the network, by their path."""
    return {
        METADATA: _json(_metadata(model, free)),
        "configs/inference.json": _json(_inference(model.config, free)),
        "docs/README.md": _readme(model, free, name),
        "LICENSE": _licence_text(model),
    }


def _weights(model: Model) -> bytes:
    packed = io.BytesIO()
    torch.save({k: v.contiguous() for k, v in model.network.state_dict().items()}, packed)
    return packed.getvalue()


def _zip(files: Mapping[str, bytes], how: int = ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with ZipFile(packed, "w") as archive:
        for path, content in files.items():
            part = ZipInfo(path)
            # without it nobody may read what comes of it
            part.external_attr = 0o644 << 16
            archive.writestr(part, content, how)
    return packed.getvalue()


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files or none; what else is in `folder` stays."""
    made = [path for path in (*folder.parents, folder, *(folder / path for path in _FOLDERS)) if not path.exists()]
    try:
        with all_or_none():
            for path, content in files.items():
                with atomic_path(folder / path) as temporary:
                    temporary.write_bytes(content)
    except BaseException:
        for empty in sorted(made, reverse=True):
            with suppress(OSError):
                empty.rmdir()
        raise


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
            "roi_size": list(_window(config.windows, free)),
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
        "run": [
            # without files MONAI would end as if all were well, and masks have the names of their images
            f"$torch._assert(len(@datalist) > 0, 'no {_wanted(config)} in ' + @dataset_dir)",
            "$torch._assert(os.path.realpath(@output_dir) != os.path.realpath(@dataset_dir), "
            "'masks would replace the images: output_dir is dataset_dir, give another folder')",
            "$@evaluator.run()",
        ],
    }


def _window(windows: WindowsConfig, free: Free) -> tuple[int, ...]:
    """Voxels of the window that MONAI slides: that of medseg, where this is a window and the network takes it."""
    own = windows.mode == "blend" and free == "batch and sizes"
    return (windows.tile_size if own else None) or windows.patch_size


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
    found = f"$sorted(glob.glob(os.path.join(glob.escape(@dataset_dir), '{wanted}')))"
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
        chain.append(_require("image.isfinite().all()", "voxels that are NaN or infinite found, expected numbers"))
        if dims == 2:
            # MONAI would take a part of the spacing for all of it
            axial = "image.affine[2, :2].abs().max() <= 0.01 * image.affine[:2, :2].abs().max()"
            chain.append(_require(axial, "a coronal, sagittal or tilted plane found, expected an axial one"))
    if how.orient and dims == 3:
        chain.append(_step("Orientationd", axcodes="RAS", labels=[["L", "R"], ["P", "A"], ["I", "S"]]))
    if how.crop == "nonzero":
        there = "image != 0 if image.any() else torch.ones_like(image, dtype=torch.bool)"
        chain.append(_step("CropForegroundd", source_key="image", select_fn=f"$lambda image: {there}"))
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
    means, sds = zip(*map(mean_and_sd, how.intensity))
    chain.append(_step("NormalizeIntensityd", channel_wise=True, subtrahend=list(means), divisor=list(sds)))
    return chain


def _postprocessing(data: DataConfig, ending: str) -> list[Json]:
    """From probabilities to a mask on the file's own grid, probabilities being what is resampled."""
    chain = [_step("Invertd", "pred", transform="@preprocessing", orig_keys="image", nearest_interp=False)]
    values = data.out_values
    if data.is_regions:
        # the number of the last region that is there: later ones are written over earlier ones
        numbers = f"torch.arange(1, {len(values) + 1}, device=scores.device).view(-1{', 1' * data.spatial_dims})"
        # MONAI's own threshold takes one half for there, medseg what is above it
        last = f"((scores > 0.5) * {numbers}).amax(0, keepdim=True)"
        chain.append(_step("Lambdad", "pred", func=f"$lambda scores: {last}"))
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


def _require(condition: str, found: str) -> Json:
    """A step that ends the run where `condition` does not hold for an image, naming its file and what was `found`."""
    told = f"str(image.meta['filename_or_obj']) + ': {found}'"
    return _step("Lambdad", func=f"$lambda image: (torch._assert(bool({condition}), {told}), image)[1]")


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


def _readme(model: Model, free: Free, name: str) -> str:
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
cd {shlex.quote(name)}
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
{_windows_differ(model, free)}
- The probabilities of all {config.data.out_channels} channels are brought back to the image's grid at once: memory.
{_postprocessing_differs(config.postprocess)}
- Files are read by MONAI, without medseg's checks of geometry, channels and units. {_files_differ(config)}
- A file that cannot be read{_or_not_finite(config)} ends the run; medseg goes on with the next case.

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
        return (
            "A plane must be NIfTI of two axes, and axial: one of three, such as (I, J, 1), a coronal, a sagittal or a "
            "tilted one ends the run with an error."
        )
    each = "Channels must lie in a file each, not in one of four axes. " if _is_numbered(config) else ""
    return f"Volumes must be NIfTI. {each}The mask of a volume of a single slice has two axes, not three."


def _or_not_finite(config: Config) -> str:
    return "" if _of_pictures(config) else ", or holds a voxel that is NaN or infinite,"


def _windows_differ(model: Model, free: Free) -> str:
    """Lines of how medseg would cut an image, with what was chosen when training ended, and how the bundle does."""
    windows, size = model.config.windows, _window(model.config.windows, free)
    here = f"windows of {_times(size)} voxels that share {windows.overlap:g} of their size"
    weights = f"Gaussian weights that are {FLOOR:g} at least"
    tile = windows.tile_size or windows.patch_size
    if windows.mode == "blend" and tile == size:
        lines = [
            f"Both take {here}, but medseg spreads them evenly, MONAI moves the last one inwards.",
            f"MONAI's windows have {weights}; medseg's have no floor.",
        ]
    else:
        limit = f" up to {windows.whole_voxels} voxels and" if windows.whole_voxels else ""
        aligned = tuple(max(ALIGNMENT, t // ALIGNMENT * ALIGNMENT) for t in tile)
        there = {
            "blend": f"windows of {_times(tile)} voxels",
            "halo": f"tiles of up to {_times(aligned)} voxels that see a margin around them",
            "whole": f"the whole image at once{limit} where it fits",
        }[windows.mode]
        lines = [f"medseg takes {there}; here {here} are averaged, by {weights}."]
    if skips_air(model.config):
        lines.append("medseg takes windows of air around the body for background; here the network looks at them too.")
    if chosen := network_at_inference(model):
        lines.append(f"medseg sets {json.dumps(chosen)} of the network when it infers; here it is as it was trained.")
    return "\n".join(f"- {line}" for line in lines)


def _times(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _licence_text(model: Model) -> str:
    attribution = model.description.get("card", {}).get("attribution")
    return f"The weights: {licence(model)}\n" + (f"\n{attribution}\n" if attribution else "")


def _json(content: Json) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
