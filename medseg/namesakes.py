"""Which rows and columns of a network's weights belong to which label or channel, and how its namesakes get them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg.catalogue import DESCRIPTION
from medseg.config import BACKGROUND, Config, DataConfig, NetworkConfig, PreprocessConfig
from medseg.errors import ConfigError
from medseg.model import trained_config
from medseg.networks import build_bare

# settings of a network that give its weights another meaning, or another field of view, and leave their shapes alone
UNSEEN = ("strides", "output_stride", "dilations", "multi_grid", "norm", "leak", "aspp_rates", "upsampling", "scales")
# structures that look this many times larger or smaller than those that were learnt want a word
FAR_SPACING = 1.5
# so many names are told in one line
MOST_NAMES = 12
# labels or channels that a network is built with in addition, to see what grows, until two of them agree: with some a
# layer comes or goes, because two numbers happen to be equal, and MONAI's VNet takes no channels but 1, 2, 4, 8 and 16.
# Few, because networks of MONAI's are built with memory
MORE = (3, 7, 1, 2, 4, 6, 12, 14, -4, -6, -8, -12)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Difference:
    """Something that was otherwise where the weights were learnt, in words; `far`: enough to want a warning."""

    what: str
    there: str
    here: str
    far: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.there} where the weights were learnt, {self.here} here"


@dataclass(frozen=True)
class Carried:
    """A tensor that took over what belongs to labels and channels of equal names; `partly`: the rest is new.

    `value` None: nothing in it has a namesake.
    """

    value: Tensor | None
    partly: bool
    why: str


def source_config(file: Path) -> Config | None:
    """The configuration of the medseg run that a file of weights lies in; None for a file from elsewhere.

    Raises `ModelError` where the run's description is damaged.
    """
    return trained_config(file.parent) if (file.parent / DESCRIPTION).is_file() else None


def differences(there: Config, here: Config) -> tuple[Difference, ...]:
    """What the weights of a run with configuration `there` meet otherwise in a run with configuration `here`."""
    found = [
        _difference("data.spatial_dims", there.data.spatial_dims, here.data.spatial_dims),
        _kind(there.data, here.data),
        _difference("labels", _labels(there.data), _labels(here.data)),
        _difference("channels", there.data.channels, here.data.channels),
        _spacing(there.preprocess, here.preprocess),
        _difference("preprocess.shape", there.preprocess.shape, here.preprocess.shape),
        *(
            _difference(f"preprocess.intensity of {name}", _normalisation(a), _normalisation(b))
            for name, a, b in _namesake_channels(there, here)
        ),
        _difference("preprocess.orient", there.preprocess.orient, here.preprocess.orient),
        _difference("windows.patch_size", there.windows.patch_size, here.windows.patch_size),
        *(_difference(f"network.{k}", getattr(there.network, k), getattr(here.network, k)) for k in UNSEEN),
    ]
    return tuple(d for d in found if d is not None)


class Namesakes:
    """Where a network's tensors hold what belongs to labels and to channels, told by building it with more of them.

    An axis that grows with them holds, behind a part that does not, a block of equal length for each (`shuffle_pixels`
    and `gather_pixels` lay sub-pixels out like that). `there`: where the weights come from, `here`: where they go.
    Where both have the same labels, or channels, in the same order, nothing is to be told of them.

    Raises `ConfigError` where networks of different size do not agree in what grows.
    """

    def __init__(self, there: DataConfig, here: DataConfig, network: NetworkConfig) -> None:
        self.names_there, self.names_here = _outputs(there), _outputs(here)
        same_kind = there.is_regions == here.is_regions
        shared = [n for n in self.names_here if n in self.names_there and same_kind]
        self._rows = [(self.names_there.index(n), self.names_here.index(n)) for n in shared]
        self._said = _label_words(shared, [n for n in self.names_here if n not in shared], same_kind=same_kind)
        self._mixing, self._new_channels = _mixing(there.channels, here.channels)
        inputs, outputs = len(here.channels), here.out_channels

        @cache
        def shapes(channels: int, scores: int) -> Shapes:
            bare = build_bare(network, here.spatial_dims, channels, scores)
            return {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}

        same_in, same_out = _is_identity(self._mixing), same_kind and self.names_here == self.names_there
        self._grows_in = {} if same_in else _growth(lambda n: shapes(n, outputs), inputs, network.name, "channel")
        self._grows_out = {} if same_out else _growth(lambda n: shapes(inputs, n), outputs, network.name, "label")

    def concern(self, name: str) -> bool:
        """Whether the tensor holds anything that belongs to a label or channel."""
        return name in self._grows_in or name in self._grows_out

    def carry(self, name: str, there: Tensor, here: Tensor) -> Carried | None:
        """What the tensor `name` becomes, out of the weights `there` and those that stand `here`.

        Rows of labels that are not there stay as they are here; a new channel begins with zeros, so that at first the
        answer is the one without it. None where the two tensors are not built alike.
        """
        if there.ndim != here.ndim:
            return None
        value = there
        partly, words = False, []
        for axis in (0, 1)[: there.ndim]:
            of_inputs = self._grows_in.get(name, {}).get(axis, 0)
            of_labels = self._grows_out.get(name, {}).get(axis, 0)
            if of_inputs and (of_labels or axis == 0):
                return None
            if of_inputs:
                mixed = _mix(value, self._mixing, of_inputs, here.shape[1])
                if mixed is None:
                    return None
                value = mixed
                partly |= bool(self._new_channels)
                words += _channel_words(self._mixing, self._new_channels)
        rows = self._grows_out.get(name, {})
        if rows and not self._rows:
            return Carried(None, False, f"{self._said}: left as initialised")
        if rows:
            taken = self._take_rows(rows, value, here)
            if taken is None:
                return None
            value = taken
            partly |= len(self._rows) < len(self.names_here)
            words += [self._said] if self.names_here != self.names_there else []
        return Carried(value, partly, "; ".join(words)) if value.shape == here.shape else None

    def _take_rows(self, blocks: Mapping[int, int], there: Tensor, here: Tensor) -> Tensor | None:
        """`here` with the blocks of shared labels out of `there`, along every axis that has such blocks."""
        value = torch.zeros(here.shape) if here.is_meta else here.detach().cpu().clone()
        places: list[tuple[list[int], list[int]]] = []
        for axis in range(here.ndim):
            block = blocks.get(axis, 0)
            base = here.shape[axis] - block * len(self.names_here)
            if there.shape[axis] != base + block * len(self.names_there):
                return None
            pairs = [(i, i) for i in range(base)]
            pairs += [(base + a * block + i, base + b * block + i) for a, b in self._rows for i in range(block)]
            places.append(([a for a, _ in pairs], [b for _, b in pairs]))
        taken = there
        for axis, (source, _) in enumerate(places):
            taken = taken.index_select(axis, torch.tensor(source))
        grid = torch.meshgrid(*(torch.tensor(target) for _, target in places), indexing="ij")
        value[grid] = taken.to(value.dtype)
        return value


def _growth(shapes: Callable[[int], Shapes], count: int, network: str, what: str) -> dict[str, dict[int, int]]:
    """By tensor and axis that grows: by how much with each label or channel (`what`).

    `shapes`: by tensor, of the network with a number of them; `count`: how many it has.
    """
    usual = shapes(count)
    seen: list[dict[str, dict[int, int]]] = []
    for more in (m for m in MORE if count + m > 0):
        try:
            growth = _steady_growth(usual, shapes(count + more), more)
        except ConfigError:
            # not with that number; with the one that counts it is built above
            continue
        if growth is None:
            continue
        if growth in seen:
            return growth
        seen.append(growth)
    raise ConfigError(
        f"network.name: which weights of {network} belong to which {what} cannot be told, because it is built "
        f"otherwise with each number of {what}s; fine-tune it on the {what}s that they have learnt, in their order"
    )


def _steady_growth(usual: Shapes, other: Shapes, more: int) -> dict[str, dict[int, int]] | None:
    """As `_growth`, between two networks; None where a layer is lacking, or a length grows by no multiple of `more`."""
    found: dict[str, dict[int, int]] = {}
    for name, shape in usual.items():
        if len(other.get(name, ())) != len(shape):
            return None
        for axis, (a, b) in enumerate(zip(shape, other.get(name, ()))):
            by, rest = divmod(b - a, more)
            if rest or by < 0:
                return None
            if by:
                found.setdefault(name, {})[axis] = by
    return found


def _outputs(data: DataConfig) -> tuple[str, ...]:
    """The name of every channel of the scores."""
    return data.foreground if data.is_regions else (BACKGROUND, *data.foreground)


def _mixing(there: Sequence[str], here: Sequence[str]) -> tuple[Tensor, list[str]]:
    """How channels there (columns) make those here (rows), and the names of the new ones.

    By name where any is in both. Else one by one where there are as many; else dealt out in turn, so that the response
    to equal channels stays.
    """
    mixing = torch.zeros(len(here), len(there))
    shared = _shared(there, here)
    if shared:
        for target, source in shared.items():
            mixing[target, source] = 1.0
        return mixing, [name for n, name in enumerate(here) if n not in shared]
    pairs = [(n % len(there), n % len(here)) for n in range(max(len(there), len(here)))]
    for source, target in pairs:
        mixing[target, source] += 1 / sum(a == source for a, _ in pairs)
    return mixing, []


def _shared(there: Sequence[str], here: Sequence[str]) -> dict[int, int]:
    """The place there of every channel here that has a namesake: of several of one name in turn."""
    left: dict[str, list[int]] = {}
    for place, name in enumerate(there):
        left.setdefault(name, []).append(place)
    return {target: left[name].pop(0) for target, name in enumerate(here) if left.get(name)}


def _is_identity(mixing: Tensor) -> bool:
    here, there = mixing.shape
    return here == there and torch.equal(mixing, torch.eye(here))


def _mix(kernel: Tensor, mixing: Tensor, block: int, length: int) -> Tensor | None:
    """`kernel` (O, base + block·channels there, …) with the channels mixed: (O, `length`, …)."""
    here, there = mixing.shape
    base = length - block * here
    if kernel.shape[1] != base + block * there:
        return None
    apart = kernel[:, base:].reshape(kernel.shape[0], there, block, *kernel.shape[2:])
    mixed = torch.einsum("hc,oc...->oh...", mixing.to(kernel.dtype), apart).flatten(1, 2)
    return torch.cat((kernel[:, :base], mixed), dim=1)


def _label_words(shared: Sequence[str], new: Sequence[str], *, same_kind: bool) -> str:
    if not same_kind:
        return "regions and labels do not stand for each other"
    if not shared:
        return "no label has a namesake here"
    return f"labels taken over: {_listed(shared)}" + (f"; new: {_listed(new)}" if new else "")


def _channel_words(mixing: Tensor, new: Sequence[str]) -> list[str]:
    here, there = mixing.shape
    if _is_identity(mixing):
        return []
    if bool(((mixing == 0) | (mixing == 1)).all()) and all(bool((mixing.sum(dim=d) <= 1).all()) for d in (0, 1)):
        return ["channels taken over by name" + (f"; new: {', '.join(new)}" if new else "")]
    return [f"{there} input channels dealt out to {here}"]


def _namesake_channels(there: Config, here: Config) -> list[tuple[str, Any, Any]]:
    theirs, ours = there.data.channels, here.data.channels
    shared = _shared(theirs, ours)
    if not shared and len(theirs) == len(ours):
        shared = {n: n for n in range(len(ours))}
    return [(ours[n], there.preprocess.intensity[m], here.preprocess.intensity[n]) for n, m in shared.items()]


def _difference(what: str, there: Any, here: Any) -> Difference | None:
    return None if there == here else Difference(what, _text(there), _text(here))


def _kind(there: DataConfig, here: DataConfig) -> Difference | None:
    """A region's score says nothing of its neighbours', a label's does: neither stands for the other."""
    one, other = ("regions, which may overlap" if d.is_regions else "labels, which do not" for d in (there, here))
    return None if one == other else Difference("what is segmented", one, other, far=True)


def _spacing(there: PreprocessConfig, here: PreprocessConfig) -> Difference | None:
    a, b = there.spacing_mm, here.spacing_mm
    if a == b:
        return None
    far = a is None or b is None or len(a) != len(b) or any(max(x / y, y / x) > FAR_SPACING for x, y in zip(a, b))
    return Difference("preprocess.spacing_mm", _text(a), _text(b), far)


def _labels(data: DataConfig) -> list[str]:
    return sorted(data.foreground)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _normalisation(intensity: Any) -> dict[str, Any]:
    return {k: v for k, v in intensity.model_dump(mode="json").items() if v is not None}


def _text(value: Any) -> str:
    if isinstance(value, list) and len(value) > MOST_NAMES:
        return f"[{_listed([_text(v) for v in value])}]"
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False).replace('"', "")
