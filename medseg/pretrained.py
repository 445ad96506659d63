"""Weights from elsewhere: files of other projects read safely, their keys renamed, their tensors made to fit."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medseg.catalogue import DESCRIPTION, WEIGHTS, weights_file
from medseg.config import Config, overlay
from medseg.errors import ConfigError, ModelError
from medseg.model import read_description
from medseg.namesakes import Difference, Namesakes, differences, source_config
from medseg.networks.fcn import UpConvolution
from medseg.networks.vgg import VGG16
from medseg.readers import file_sha256
from medseg.state import STATE, is_state

Outcome = Literal["loaded", "adapted", "skipped", "fresh"]

TORCH_FILES = (".pth", ".pt", ".tar", ".ckpt", ".bin")
# where training scripts keep the weights in a file, and what wrappers put before each key
WRAPPERS = ("state_dict", "model_state_dict", "model", "network")
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "backbone.", "encoder.")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
HEADS = ("fc.", "classifier.", "aux_classifier.", "conv_seg.", "head.", "heads.")
# a network inside another one, such as that for several scales, has its name before each key
ROOTS = ("", "network.")
# where model.json tells which images a run has learnt
LEARNT = ("images_sha256", "images_voxels")


@dataclass(frozen=True)
class Row:
    """What became of one key: `key_there` is empty where the file lacks it, `key_here` where the network does.

    `outcome`: loaded as it is, adapted as `why` says, skipped, or fresh: a weight here that stays as initialised.
    `partly`: some of an adapted weight stays as initialised.
    """

    key_there: str
    key_here: str
    shape_there: tuple[int, ...]
    shape_here: tuple[int, ...]
    outcome: Outcome
    why: str = ""
    partly: bool = False


@dataclass(frozen=True)
class Pretrained:
    """A file whose weights were loaded, and what became of every key.

    `differences`: what was otherwise in the medseg run that it comes from.
    """

    path: Path
    sha256: str
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...] = ()

    def count(self, outcome: Outcome) -> int:
        """How many keys had this outcome."""
        return sum(row.outcome == outcome for row in self.rows)

    @property
    def loaded(self) -> frozenset[str]:
        """Keys of the network that the file filled as a whole."""
        return frozenset(r.key_here for r in self.rows if r.outcome in ("loaded", "adapted") and not r.partly) - {""}

    @property
    def share(self) -> float:
        """Share of the network's kernels, by their sizes, that the file filled, 0–1."""
        kernels = [row for row in self.rows if len(row.shape_here) > 2 and row.outcome != "skipped"]
        filled = sum(prod(row.shape_here) for row in kernels if row.outcome != "fresh")
        return filled / max(1, sum(prod(row.shape_here) for row in kernels))

    def record(self) -> dict[str, Any]:
        """What model.json says of it."""
        counts = Counter(row.outcome for row in self.rows)
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            **{name: counts[name] for name in get_args(Outcome)},
            **{key: sorted(digests) for key, digests in learnt_images(self.path).items()},
        }

    def summary(self) -> str:
        """One line, and one more for each thing that differs from where the weights were learnt."""
        first = (
            f"{self.path.name}: {self.count('loaded')} tensors loaded, {self.count('adapted')} adapted, "
            f"{self.count('skipped')} of the file skipped, {self.count('fresh')} of the network left as initialised; "
            f"{100 * self.share:.0f} % of its kernels are from the file"
        )
        return "\n".join([first, *(f"  {difference}" for difference in self.differences)])

    def text_table(self) -> str:
        """Every key as aligned plain text."""
        lines = [("outcome", "in the file", "shape", "here", "shape", "why")]
        for row in self.rows:
            there = _shape(row.shape_there) if row.key_there else ""
            here = _shape(row.shape_here) if row.key_here else ""
            lines.append((row.outcome, row.key_there, there, row.key_here, here, row.why))
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def load_pretrained(
    network: nn.Module, path: str | Path, *, spatial_dims: int, config: Config | None = None
) -> Pretrained:
    """Load the weights of `path` into `network`, as far as they fit; the rest of the network stays as it is.

    `path`: a medseg run folder, the name of a model that comes with medseg, .safetensors, or a file of `torch.save`
    whose state dict is that of a medseg network, of MONAI's or MedicalNet's ResNet, or of torchvision's ResNet,
    DeepLabv3 or VGG-16. `config`: that of `network`; weights that belong to a label or a channel of a medseg run are
    then taken over by its name, and what else differs is told. Made to fit are:

    - kernels of fewer axes: repeated along each new, last axis and divided by its length (Carreira & Zisserman 2017,
      arXiv:1705.07750), so that what is constant along it gives the same answer; of more axes: summed over the last;
    - the input channels of the first kernel: dealt out in turn, so that the response to equal channels stays;
    - shortcuts without weights (He et al. 2016, option A): the identity as a 1×1 kernel;
    - a bias before a batch norm: into its running mean; a batch norm where there is none here: into kernel and bias.

    Raises `ConfigError` for a path that cannot be it, `ModelError` for a file that is damaged, needs code to be read or
    holds no kernel that fits; nothing is changed then.
    """
    file = weights_file(Path(path))
    there, here = read_weights(file), network.state_dict()
    _refuse_whole_numbers(file, there)
    source = None if config is None else source_config(file)
    namesakes: Namesakes | None = None
    apart: tuple[Difference, ...] = ()
    if config is not None and source is not None:
        apart = differences(source, config)
        namesakes = Namesakes(source.data, config.data, config.network)
    match = _Match(network, there, spatial_dims, namesakes)
    match.run()
    if not any(row.outcome in ("loaded", "adapted") and len(row.shape_here) > 2 for row in match.rows):
        raise ModelError(
            f"{file}: no kernel in it fits this network; its {len(there)} keys begin with {_first(there)}, the "
            f"{len(here)} of the network with {_first(here)}; choose the network.name, network.encoder and "
            "network.width that the weights belong to"
        )
    _refuse_other_encoder(file, match.rows)
    broken = [key for key, value in match.values.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ModelError(f"{file}: weights that are not finite, first for `{broken[0]}`; copy the file again")
    with torch.no_grad():
        for key, value in match.values.items():
            here[key].copy_(value)
    return Pretrained(file, file_sha256(file), tuple(match.rows), apart)


def inherited_network(path: Path, given: Mapping[str, Any], *, spatial_dims: int) -> dict[str, Any]:
    """The settings of the network that the weights at `path` need: those of their medseg run, under what is `given`.

    `given` alone where that is another network, where the images have other dimensions, or of a file from elsewhere.
    """
    source = source_config(weights_file(path))
    if source is None or source.data.spatial_dims != spatial_dims:
        return dict(given)
    theirs = source.network.model_dump(mode="json")
    another = any(given.get(key, theirs[key]) != theirs[key] for key in ("name", "encoder"))
    return dict(given) if another else overlay(theirs, given)


def _refuse_whole_numbers(file: Path, there: Mapping[str, Tensor]) -> None:
    whole = next((k for k, t in there.items() if t.ndim > 2 and not t.is_floating_point()), None)
    if whole is not None:
        raise ModelError(
            f"{file}: `{whole}` holds numbers of type {there[whole].dtype}, expected floating ones; save the weights "
            "before they are quantised"
        )


def _refuse_other_encoder(file: Path, rows: Sequence[Row]) -> None:
    """Layers of two depths have kernels of equal shape: what is left over in a stage tells that it is another one."""
    stray = [r.key_there for r in rows if r.outcome == "skipped" and len(r.shape_there) > 2 and _stage(r.key_there)]
    filled = {_stage(r.key_here) for r in rows if r.outcome in ("loaded", "adapted") and len(r.shape_here) > 2} - {""}
    empty = [
        r.key_here for r in rows if r.outcome == "fresh" and len(r.shape_here) > 2 and _stage(r.key_here) in filled
    ]
    if stray or empty:
        what = f"`{stray[0]}` has no place in this network" if stray else f"has nothing for `{empty[0]}`"
        raise ModelError(
            f"{file}: {what}: these are the weights of another encoder; choose the network.encoder and network.width "
            "that they belong to"
        )


def _stage(key: str) -> str:
    """The stage of an encoder that a key belongs to, or nothing."""
    found = re.search(r"(?:^|\.)(layer\d+|stages\.\d+|encoder\.blocks\.\d+)\.", key)
    return found[1] if found else ""


# ---- reading


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or run folder by key, out of whatever holds the state dict. Nothing in it is run.

    Raises `ConfigError` for a path that cannot be it, such as the state of a training, `ModelError` for a file that is
    damaged or needs code to be read.
    """
    file = weights_file(path)
    if not file.is_file():
        if file.name == WEIGHTS and (file.parent / STATE).is_file():
            raise ConfigError(f"{file}: is not there yet, since {_to_finish(file.parent)}")
        raise ConfigError(f"{file}: no such file; expected .safetensors, {', '.join(TORCH_FILES)} or a run folder")
    if file.suffix == ".safetensors":
        try:
            return dict(load_file(file))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read as safetensors ({error}); copy it again") from error
    if file.suffix not in TORCH_FILES:
        raise ConfigError(
            f"{file}: weights are read from .safetensors, {', '.join(TORCH_FILES)} or a run folder, not from "
            f"`{file.suffix}`"
        )
    try:
        # what torch warns of, such as a script, it refuses as well
        with warnings.catch_warnings(action="ignore"):
            # files of torch before 1.6 are no zip archives and cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise ModelError(_unreadable(file, error)) from error
    if is_state(content):
        finished = all((file.parent / name).is_file() for name in (WEIGHTS, DESCRIPTION))
        advice = f"give its folder, {file.parent}" if finished else _to_finish(file.parent)
        raise ConfigError(
            f"{file}: is what a training goes on from, expected what it ends with: the average of its weights, and "
            f"which images they have learnt; {advice}"
        )
    return _unwrap(file, content)


def learnt_images(path: Path) -> dict[str, frozenset[str]]:
    """What a medseg run was trained on, and what its own first weights were.

    `images_sha256`: digests as `image_digests` gives them; `images_voxels`: as `voxel_digests`, for runs of earlier
    versions as `stored_voxel_digests` or empty. Both are empty for weights from elsewhere: nobody knows. Raises
    `ModelError` where the run's description is damaged.
    """
    file, learnt = weights_file(path), {key: frozenset[str]() for key in LEARNT}
    # a link to weights may lie in a run folder, or outside of it
    for folder in {file.parent, file.resolve().parent}:
        if (folder / DESCRIPTION).is_file():
            training = read_description(folder).get("training", {})
            before = training.get("pretrained") or {}
            learnt = {key: found | {*training.get(key, ()), *before.get(key, ())} for key, found in learnt.items()}
    return learnt


def _to_finish(folder: Path) -> str:
    return f"the training has not ended: finish it by `medseg train DATASET -o {folder} --resume`, then give {folder}"


def _unreadable(file: Path, error: Exception) -> str:
    text = str(error)
    if "TorchScript" in text:
        needs = "is a TorchScript archive"
    elif "Weights only load failed" in text:
        found = re.search(r"GLOBAL (\S+)", text)
        needs = f"needs `{found[1]}`" if found else "holds more than tensors"
    else:
        reason = text.splitlines()[0][:100] if text else "it ends too early"
        return f"{file}: cannot be read as a file of torch.save ({type(error).__name__}: {reason}); copy it again"
    return (
        f"{file}: {needs}, and code from a file is never run; where it comes from, save the tensors alone: "
        "torch.save(network.state_dict(), ...)"
    )


def _unwrap(file: Path, content: Any) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
            break
        content = inner
    keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise ModelError(f"{file}: no state dict found but {keys or 'nothing'}; expected tensors by name")


# ---- names


def _bare(key: str) -> str:
    while prefix := next((p for p in PREFIXES if key.startswith(p)), ""):
        key = key.removeprefix(prefix)
    return key


def _names(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> dict[str, str]:
    """The key here for every key there that has one; each is given once."""
    other = _torchvision({_bare(key): tensor for key, tensor in there.items()})
    names: dict[str, str] = {}
    taken: set[str] = set()
    for key in there:
        for name in (root + n for n in _spellings(key, other) for root in ROOTS):
            if name in here and name not in taken:
                names[key] = name
                taken.add(name)
                break
    return names


def _spellings(key: str, other: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield key
    bare = _bare(key)
    yield from other.get(bare, ())
    yield f"encoder.{bare}"
    while prefix := next((p for p in PREFIXES if key.startswith(p)), ""):
        key = key.removeprefix(prefix)
        yield key


def _torchvision(there: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names here of what torchvision names in another way: DeepLabv3's head, VGG-16."""
    table: dict[str, Sequence[str]] = {}
    blocks = {int(key.split(".")[3]) for key in there if key.startswith("classifier.0.convs.")}
    if blocks:
        pooled = max(blocks)
        for n in blocks - {pooled}:
            table |= {f"classifier.0.convs.{n}.{part}": [f"aspp.branches.{n}.{part}"] for part in (0, 1)}
        table |= {
            f"classifier.0.convs.{pooled}.1": ["aspp.pooling.conv"],
            f"classifier.0.convs.{pooled}.2": ["aspp.pooling.norm"],
            "classifier.0.project.0": ["aspp.project"],
            "classifier.0.project.1": ["aspp.norm"],
            "classifier.1": ["head.0"],
            "classifier.2": ["head.1"],
            "classifier.4": ["classifier.conv"],
        }
    features = sorted({int(key.split(".")[1]) for key in there if re.match(r"features\.\d+\.weight$", key)})
    convs = [n for n in features if there[f"features.{n}.weight"].ndim == 4]
    if len(convs) == sum(VGG16.DEPTHS):
        places = [(block, number) for block, depth in enumerate(VGG16.DEPTHS) for number in range(depth)]
        for n, (block, number) in zip(convs, places):
            for part in (0, 1):
                place = f"{block}.{number}.{part}"
                table[f"features.{n + part}"] = [f"encoder.blocks.{place}", f"down.{place}"]
        table |= {"classifier.0": ["fully.0.0", "middle.0.0"], "classifier.3": ["fully.2.0", "middle.1.0"]}
    split = ((key, *key.rpartition(".")[::2]) for key in there)
    return {key: [f"{name}.{kind}" for name in table[layer]] for key, layer, kind in split if layer in table}


# ---- tensors


class _Match:
    """The tensors of a file laid beside those of a network: `values` by key here, and a row for every key."""

    def __init__(
        self, network: nn.Module, there: Mapping[str, Tensor], spatial_dims: int, namesakes: Namesakes | None = None
    ) -> None:
        self.network = network
        self.namesakes = namesakes
        self.here: dict[str, Tensor] = network.state_dict()
        self.there = dict(there)
        self.names = _names(there, self.here)
        self.kernel_axes = spatial_dims + 2
        self.inputs = self._inputs()
        self.values: dict[str, Tensor] = {}
        self.rows: list[Row] = []
        self._notes: dict[str, list[str]] = {}
        self._partly: set[str] = set()

    def _inputs(self) -> tuple[int, int]:
        """Input channels there and here, told by the first kernel."""
        stem = next((name for name, tensor in self.here.items() if tensor.ndim == self.kernel_axes), "")
        found = next((self.there[key] for key, name in self.names.items() if name == stem), None)
        return (found.shape[1], self.here[stem].shape[1]) if found is not None and found.ndim > 2 else (0, 0)

    def run(self) -> None:
        """Fill `values` and `rows`."""
        self._fold()
        self._split_projection()
        for key, tensor in self.there.items():
            name = self.names.get(key)
            notes = self._notes.get(key, [])
            if name is None:
                done: Outcome = "adapted" if notes else "skipped"
                why = "; ".join(notes) or self._no_place(key)
                self.rows.append(Row(key, "", tuple(tensor.shape), (), done, why))
                continue
            value, changes = self._fit(tensor, name)
            if value is None:
                outcome: Outcome = "skipped"
            else:
                self.values[name] = value
                outcome = "adapted" if notes or changes else "loaded"
                changes = [*notes, *changes]
            why = "; ".join(changes) or self._norm_note(key, name)
            shapes = tuple(tensor.shape), tuple(self.here[name].shape)
            self.rows.append(Row(key, name, *shapes, outcome, why, name in self._partly))
        self._identity_shortcuts()
        for name, tensor in self.here.items():
            if name not in self.values:
                self.rows.append(Row("", name, (), tuple(tensor.shape), "fresh"))

    def _fit(self, tensor: Tensor, name: str) -> tuple[Tensor | None, list[str]]:
        """The tensor in the shape that it has here, and what was done; None and the reason where that cannot be."""
        target = self.here[name]
        carried = self._carried(tensor, name)
        if carried is not None:
            return carried
        if tensor.shape == target.shape:
            return tensor, []
        changes: list[str] = []
        value = tensor
        if target.ndim == self.kernel_axes and 2 <= tensor.ndim <= 5:
            if tensor.ndim == 2:
                value = _as_kernel(tensor, target.shape[1])
                changes.append("fully connected weights as a kernel")
            value = self._with_axes(value, name, changes)
            if value.shape[1] != target.shape[1] and (value.shape[1], target.shape[1]) == self.inputs:
                changes.append(f"{value.shape[1]} input channels dealt out to {target.shape[1]}")
                value = _deal_channels(value, target.shape[1])
        if value.shape == target.shape:
            return value, changes
        if value.shape[1:] == target.shape[1:] and value.ndim and target.ndim:
            return None, [f"{value.shape[0]} outputs there, {target.shape[0]} here: left as initialised"]
        return None, [f"shape {_shape(tensor.shape)} does not fit {_shape(target.shape)}: left as initialised"]

    def _carried(self, tensor: Tensor, name: str) -> tuple[Tensor | None, list[str]] | None:
        """As `_fit`, by names of labels and channels; None where they have no share in it, or it is built otherwise."""
        if self.namesakes is None or not self.namesakes.concern(name):
            return None
        changes: list[str] = []
        value = self._with_axes(tensor, name, changes) if self.here[name].ndim == self.kernel_axes else tensor
        carried = self.namesakes.carry(name, value, self.here[name])
        if carried is None:
            return None
        if carried.partly:
            self._partly.add(name)
        return carried.value, [*changes, carried.why] if carried.why else changes

    def _with_axes(self, kernel: Tensor, name: str, changes: list[str]) -> Tensor:
        """`kernel` with as many axes as the one here."""
        target, axes = self.here[name], kernel.ndim - 2
        strides = self._transposed_strides(name)
        while kernel.ndim < target.ndim:
            length = target.shape[kernel.ndim]
            shares = _shares(length, strides[kernel.ndim - 2] if strides else 1)
            kernel = kernel.unsqueeze(-1) * shares.to(kernel.dtype)
        while kernel.ndim > target.ndim and not strides:
            kernel = kernel.sum(dim=-1)
        if kernel.ndim - 2 != axes:
            changes.append(f"{'inflated' if kernel.ndim - 2 > axes else 'summed'} from {axes}D to {kernel.ndim - 2}D")
        return kernel

    def _transposed_strides(self, name: str) -> tuple[int, ...]:
        """The strides of a transposed convolution; nothing for other layers."""
        layer = self.network.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, UpConvolution):
            return layer.factors
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            return layer.stride
        return ()

    def _fold(self) -> None:
        """Put biases before a batch norm into it, and batch norms that have no place here into the kernel before."""
        for key in [k for k in self.names if k.endswith(".weight")]:
            layer, norm = key.removesuffix(".weight"), _norm_after(key.removesuffix(".weight"))
            mean, variance = self.there.get(f"{norm}.running_mean"), self.there.get(f"{norm}.running_var")
            if mean is None or variance is None or self.there[key].ndim < 3:
                continue
            bias = self.there.get(f"{layer}.bias")
            if bias is not None and f"{layer}.bias" not in self.names and f"{norm}.running_mean" in self.names:
                self.there[f"{norm}.running_mean"] = mean - bias
                self._notes[f"{layer}.bias"] = [f"into {norm}.running_mean"]
                self._notes[f"{norm}.running_mean"] = [f"less {layer}.bias"]
            here = f"{self.names[key].removesuffix('.weight')}.bias"
            if f"{norm}.weight" in self.names or here not in self.here:
                continue
            # a norm without weights of its own has none in the file
            weight = self.there.get(f"{norm}.weight", torch.ones_like(variance))
            scale = weight / (variance + nn.BatchNorm2d(1).eps).sqrt()
            shift = self.there.get(f"{norm}.bias", torch.zeros_like(mean)) - mean * scale
            self.there[key] = self.there[key] * scale.reshape(-1, *(1,) * (self.there[key].ndim - 1))
            self.there[f"{layer}.bias"] = shift if bias is None else shift + bias * scale
            self.names[f"{layer}.bias"] = here
            for kind in ("weight", "bias", "running_mean", "running_var"):
                self._notes[f"{norm}.{kind}"] = [f"into {layer}, which has no norm after it here"]
            self._notes[key] = self._notes[f"{layer}.bias"] = [f"with {norm}"]

    def _split_projection(self) -> None:
        """What ASPP's projection does with the pooled branch, where that branch is added here and not concatenated."""
        for key, name in list(self.names.items()):
            root, found, _ = name.partition("aspp.project.weight")
            here = f"{root}aspp.pooling.project.weight"
            if not found or here not in self.here:
                continue
            width, tensor = self.here[name].shape[1], self.there[key]
            if tensor.shape[1] == width + self.here[here].shape[1]:
                pooled = f"{key}[:, {width}:]"
                self.there[key], self.there[pooled] = tensor[:, :width], tensor[:, width:]
                self.names[pooled] = here
                self._notes[key] = [f"without {pooled}"]
                self._notes[pooled] = ["the pooled branch, which is added after the norm here"]

    def _identity_shortcuts(self) -> None:
        """Where the file's shortcuts have no weights: the identity, zero in channels that are new."""
        if any("downsample" in key for key in self.there):
            return
        for name, target in self.here.items():
            block, found, _ = name.partition(".downsample.0.weight")
            if not found or f"{block}.conv1.weight" not in self.values:
                continue
            identity = torch.zeros(target.shape)
            shared = min(target.shape[:2])
            identity[range(shared), range(shared)] = 1.0
            self._give(name, identity)
            norm = self.network.get_submodule(f"{block}.downsample.1")
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                ones = torch.ones(target.shape[0])
                # so that the norm divides by 1
                made = {"weight": ones, "bias": 0 * ones, "running_mean": 0 * ones, "running_var": ones - norm.eps}
                for kind, value in made.items():
                    self._give(f"{block}.downsample.1.{kind}", value)

    def _give(self, name: str, value: Tensor) -> None:
        self.values[name] = value
        why = "shortcut without weights in the file: the identity"
        self.rows.append(Row("", name, (), tuple(value.shape), "adapted", why))

    def _no_place(self, key: str) -> str:
        kind = key.rpartition(".")[2]
        if f"{key.removesuffix(kind)}weight" in self.names:
            if kind in STATISTICS:
                return "running statistics of a batch norm, which the norm here does not keep"
            return "the layer here has none"
        if _bare(key).startswith(HEADS):
            return "head of the other network"
        return "no such layer in this network"

    def _norm_note(self, key: str, name: str) -> str:
        layer_there, layer_here = key.rpartition(".")[0], name.rpartition(".")[0]
        other = f"{layer_there}.running_mean" in self.there and f"{layer_here}.running_mean" not in self.here
        return "of a batch norm, into another norm" if other else ""


def _norm_after(layer: str) -> str:
    """The name of the norm that follows a convolution: conv1 → bn1, downsample.0 → downsample.1."""
    head, dot, last = layer.rpartition(".")
    after = str(int(last) + 1) if last.isdecimal() else last.replace("conv", "bn")
    return head + dot + after


def _as_kernel(weights: Tensor, in_channels: int) -> Tensor:
    """Weights (out, in·n·n) of a fully connected layer on n × n maps as (out, in, n, n)."""
    side = isqrt(weights.shape[1] // in_channels)
    if side * side * in_channels != weights.shape[1]:
        return weights[:, :, None, None]
    return weights.reshape(weights.shape[0], in_channels, side, side)


def _shares(length: int, stride: int) -> Tensor:
    """What each tap along a new axis gets of a weight: what an output voxel meets adds up to it.

    An output voxel of a convolution meets all taps, one of a transposed convolution every `stride`-th.
    """
    met = Counter(tap % stride for tap in range(length))
    return torch.tensor([1 / met[tap % stride] for tap in range(length)])


def _deal_channels(kernel: Tensor, channels: int) -> Tensor:
    """`kernel` (out, in, *k) with `channels` inputs: dealt out in turn, copies share the weight, surplus is added."""
    there = kernel.shape[1]
    pairs = [(n % there, n % channels) for n in range(max(there, channels))]
    copies = Counter(source for source, _ in pairs)
    dealt = kernel.new_zeros(kernel.shape[0], channels, *kernel.shape[2:])
    for source, target in pairs:
        dealt[:, target] += kernel[:, source] / copies[source]
    return dealt


def _first(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in list(keys)[:3])


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"
