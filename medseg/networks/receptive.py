"""What a network sees and costs, layer by layer: kernels, strides, fields of view, gridding, multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from math import lcm, log, prod
from typing import Any

import numpy as np
import torch
from torch import nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError, MedsegError
from medseg.networks import build_network
from medseg.networks._fields import INTERPOLATIONS, POOLINGS, Dependence, NoRule, depend, reach, window_rule
from medseg.networks._sets import Vector, dense, element, volume
from medseg.networks._trace import Constant, Graph, Node, Value, on_meta, record

__all__ = ["LayerReport", "NetworkReport", "analyse", "build_bare", "count", "field_at", "fit_width"]

Axes = tuple[int, ...]

# sides of the images that are tried until the field of view fits inside: nothing is computed on them
_SIDES = (256, 1024, 4096, 16384)
# output voxels whose fields are compared, where strides and interpolation make them differ
_MAX_PHASES = 64
_BUILDS = 10
# what counts as "not far above" a target
_ABOVE = 1.02


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One convolution or pooling; all tuples have one number for each axis.

    `output_size` is O = (I + 2P − d(K − 1) − 1) / S + 1 at the given patch, the last two also of a transposed
    convolution. `cumulative_stride` is in voxels of the image, None behind a mean over the whole image, and
    `receptive_field` is then the patch. `dead_taps` see nothing but padding; `padding_share` is the share of all
    products of tap and output voxel that meet padding.
    """

    name: str
    kind: str
    kernel: Axes
    dilation: Axes
    effective_kernel: Axes
    stride: Axes
    padding: Axes
    input_size: Axes
    output_size: Axes
    cumulative_stride: tuple[float, ...] | None
    receptive_field: Axes
    coverage: float
    sees_whole_image: bool
    in_channels: int
    out_channels: int
    groups: int
    parameters: int
    multiply_adds: int
    calls: int
    taps: int
    dead_taps: int
    padding_share: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """A whole network at one patch; tuples have one number for each axis.

    `receptive_field` is that of an output voxel far from any border, the largest where output voxels differ;
    `coverage` is the share of its bounding box that reaches the voxel, the smallest where they differ. By convention
    neither counts what the statistics of norms mix, nor a mean over the whole image (`sees_whole_image`). Where
    `field_is_exact` is false, a warning says why and the field is given as the whole patch.
    """

    name: str
    spatial_dims: int
    in_channels: int
    patch: Axes
    parameters: int
    multiply_adds: int
    output_stride: int
    output_strides: Axes
    receptive_field: Axes
    coverage: float
    sees_whole_image: bool
    field_is_exact: bool
    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "layers"}
        layers = [layer.as_dict() for layer in self.layers]
        return {**{k: v for k, v in plain.items() if k != "warnings"}, "layers": layers, "warnings": plain["warnings"]}


@dataclass(frozen=True)
class _Field:
    extent: Axes
    coverage: float
    whole: bool
    clipped: bool


def analyse(
    network: nn.Module, *, spatial_dims: int, in_channels: int, shape: Sequence[int], name: str = ""
) -> NetworkReport:
    """Everything about a network at a patch of `shape`, which is left untouched. Raises `DataError` as the network."""
    bare = on_meta(network)
    patch = tuple(shape)
    parameters = sum(p.numel() for p in bare.parameters())
    small = record(bare, (1, in_channels, *patch))
    large, field, warnings = _whole_field(bare, small, spatial_dims, in_channels)
    if large is not None and [n.operation for n in large.nodes] != [n.operation for n in small.nodes]:
        # operations that come and go with the size cannot be told from one another
        large = None
    layers = tuple(_layers(small, large, spatial_dims))
    strides = [layer.cumulative_stride for layer in layers if layer.cumulative_stride is not None]
    coarsest = tuple(int(max(s[axis] for s in strides)) if strides else 1 for axis in range(spatial_dims))
    return NetworkReport(
        name=name or type(network).__name__,
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        patch=patch,
        parameters=parameters,
        multiply_adds=sum(_multiply_adds(small, node) for node in small.nodes),
        output_stride=max(coarsest),
        output_strides=coarsest,
        receptive_field=patch if field is None else field.extent,
        coverage=1.0 if field is None else field.coverage,
        sees_whole_image=field is None or field.whole,
        field_is_exact=field is not None and not field.clipped,
        layers=layers,
        warnings=(*warnings, *_warnings(layers, field, coarsest, patch)),
    )


def count(network: nn.Module, *, spatial_dims: int, in_channels: int, shape: Sequence[int]) -> tuple[int, int]:
    """Parameters, and multiply-adds of one pass of an image of `shape`; quicker than `analyse`."""
    bare = on_meta(network)
    if len(shape) != spatial_dims:
        raise ConfigError(f"{tuple(shape)} has {len(shape)} numbers, expected {spatial_dims}, one for each axis")
    graph = record(bare, (1, in_channels, *shape))
    return sum(p.numel() for p in bare.parameters()), sum(_multiply_adds(graph, node) for node in graph.nodes)


def field_at(network: nn.Module, *, in_channels: int, shape: Sequence[int], voxel: Sequence[int]) -> Vector:
    """The voxels of an image of `shape` that the output voxel depends on, true in a grid of that shape.

    For small images: unlike `analyse` it writes the grid down. Raises `ConfigError` for an operation without a rule.
    """
    graph = record(on_meta(network), (1, in_channels, *shape))
    try:
        found = depend(graph, graph.output, element(graph.shapes[graph.output], (None, None, *voxel)))
    except NoRule as error:
        raise ConfigError(f"what reaches an output voxel is not known: no rule for {error}") from error
    if not found.products:
        return np.zeros(tuple(shape), dtype=bool)
    return dense(found.products, range(2, 2 + len(shape)))


def fit_width(
    config: NetworkConfig,
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    shape: Sequence[int],
    multiply_adds: int | None = None,
    parameters: int | None = None,
) -> NetworkConfig:
    """`config` with the `width` that brings its multiply-adds or its parameters closest to the target.

    Widths that land more than 2 % above are taken only where no other is near. Raises `ConfigError` where the width
    changes nothing, or not exactly one target is given.
    """
    if (multiply_adds is None) == (parameters is None):
        raise ConfigError("fit_width needs exactly one target: multiply_adds or parameters")
    target = float(parameters if multiply_adds is None else multiply_adds)  # type: ignore[arg-type]
    tried: dict[float, int] = {}

    def cost(width: float) -> int:
        if width not in tried:
            settings = config.model_copy(update={"width": width})
            network = build_bare(settings, spatial_dims, in_channels, out_channels)
            counts = count(network, spatial_dims=spatial_dims, in_channels=in_channels, shape=shape)
            tried[width] = counts[0] if multiply_adds is None else counts[1]
        return tried[width]

    low = high = config.width
    while cost(low) > target and len(tried) < _BUILDS // 2:
        high, low = low, low / 2
    while cost(high) < target and len(tried) < _BUILDS // 2:
        low, high = high, high * 2
    if len(tried) > 1 and len(set(tried.values())) == 1:
        raise ConfigError(f"network `{config.name}` costs the same at every width: it cannot be fitted to a target")
    while len(tried) < _BUILDS and low < high and tried[low] < target < tried[high]:
        # cost grows about as the square of the width
        share = (log(target) - log(tried[low])) / (log(tried[high]) - log(tried[low]))
        middle = float(f"{low * (high / low) ** min(0.9, max(0.1, share)):.4g}")
        if middle in tried:
            break
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    near = [w for w, found in tried.items() if found <= _ABOVE * target] or list(tried)
    best = min(near, key=lambda w: (abs(log(tried[w] / target)), abs(w - 1)))
    return config.model_copy(update={"width": best})


def build_bare(config: NetworkConfig, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A network to look at: on the meta device, where building costs nothing, unless it must read its own numbers."""
    try:
        with torch.device("meta"):
            return build_network(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
    except (RuntimeError, NotImplementedError):
        # some networks read numbers back while they are built
        return build_network(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _whole_field(
    network: nn.Module, small: Graph, dims: int, in_channels: int
) -> tuple[Graph | None, _Field | None, list[str]]:
    """The graph on an image that holds the whole field, the field, and what could not be found out."""
    large = None
    field = None
    try:
        for side in _SIDES:
            try:
                large = record(network, (1, in_channels, *(side,) * dims))
            except (RuntimeError, ValueError, TypeError, MedsegError) as error:
                reason = f"it takes no image of {side} voxels a side ({_first_line(error)})"
                break
            field = _field(large, large.output, _scales(large, dims), dims)
            if not field.clipped:
                return large, field, []
        else:
            reason = f"it is larger than {_SIDES[-1]} voxels"
        field = None
    except NoRule as error:
        reason = f"there is no rule for {error}"
    return large, None, [f"the field of view is given as the whole input: {reason}"]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _field(graph: Graph, value: int, scales: Sequence[_Scale | None], dims: int) -> _Field:
    """Largest extent and smallest coverage over the central voxels of one period of the strides."""
    shape, scale = graph.shapes[value], scales[value]
    period = scale.period if scale is not None else 1
    steps = sorted({round(step) for step in np.linspace(0, period - 1, min(period, _MAX_PHASES))})
    extents, coverages, whole, clipped = [(0,) * dims], [1.0], False, False
    for step in steps:
        voxel = [min(n - 1, n // 2 // period * period + step) for n in shape[2:]]
        found = depend(graph, value, element(shape, (None, None, *voxel)))
        whole |= found.sees_whole_image
        spans = reach(found.products, range(2, 2 + dims))
        if spans is None:
            continue
        extent = tuple(last - first + 1 for first, last in spans)
        extents.append(extent)
        clipped |= any(first == 0 or last == n - 1 for (first, last), n in zip(spans, graph.shapes[0][2:]))
        coverages.append(_coverage(found, extent))
    return _Field(tuple(map(max, zip(*extents))), min(coverages), whole, clipped)


def _coverage(found: Dependence, extent: Axes) -> float:
    return volume(found.products, range(2, 2 + len(extent))) / prod(extent)


@dataclass(frozen=True)
class _Scale:
    """Voxels of the image from one voxel of a tensor to the next, by axis; all those on the way there."""

    steps: tuple[Fraction, ...]
    size: Axes
    passed: frozenset[tuple[Fraction, ...]]

    @property
    def period(self) -> int:
        """Voxels of the tensor after which its fields repeat."""
        return lcm(*((p / s).numerator for passed in self.passed for p, s in zip(passed, self.steps)))


def _scales(graph: Graph, dims: int) -> list[_Scale | None]:
    """For every value; None behind a mean over the whole image and where there is no space left."""
    ones = (Fraction(1),) * dims
    image = tuple(graph.shapes[0][2:])
    scales: list[_Scale | None] = [None] * len(graph.shapes)
    scales[0] = _Scale(ones, image, frozenset({ones}))
    for node in graph.nodes:
        known = [s for n in node.inputs if (s := scales[n]) is not None and (min(s.size) > 1 or max(image) == 1)]
        if not known:
            continue
        shape = graph.shapes[node.outputs[0]]
        size = tuple(shape[-dims:])
        passed = frozenset[tuple[Fraction, ...]]().union(*(s.passed for s in known))
        steps = _steps(graph, node, known[0], size, image)
        if steps is None:
            found = _Scale(known[0].steps, known[0].size, passed)
        elif max(size) == 1 and max(image) > 1 and len(shape) >= dims + 2:
            continue
        else:
            found = _Scale(steps, size, passed | {steps})
        for output in node.outputs:
            scales[output] = found
    return scales


def _steps(graph: Graph, node: Node, before: _Scale, size: Axes, image: Axes) -> tuple[Fraction, ...] | None:
    """The scale after a node, None where it stays or nothing is known."""
    dims = len(size)
    name = node.operation
    if name == "convolution" or name in POOLINGS:
        _, stride, _, _ = window_rule(node, len(graph.shapes[node.inputs[0]]) - 2)
        ratios = [Fraction(s) for s in stride[-dims:]]
        if node.arguments.get("transposed"):
            ratios = [1 / r for r in ratios]
    elif name in INTERPOLATIONS:
        less = 1 if node.arguments.get("align_corners") else 0
        ratios = [Fraction(max(n - less, 1), max(m - less, 1)) for n, m in zip(before.size, size)]
    elif len(graph.shapes[node.outputs[0]]) == dims + 2 and name in ("view", "_unsafe_view", "clone"):
        ratios = [Fraction(n, m) for n, m in zip(before.size, size)]
    elif len(graph.shapes[node.outputs[0]]) == dims + 2:
        ratios = [Fraction(1)] * dims
    else:
        return None
    if all(n % m == 0 for n, m in zip(image, size)):
        # padded so that a stride divides: then the sizes say it, whatever the operation
        return tuple(Fraction(n, m) for n, m in zip(image, size))
    return tuple(s * r for s, r in zip(before.steps, ratios))


def _layers(small: Graph, large: Graph | None, dims: int) -> Iterator[LayerReport]:
    """Sizes and costs from the graph at the patch, fields from the one of an image without borders, if there is one."""
    calls: dict[str, list[Node]] = {}
    for node in small.nodes:
        if node.operation == "convolution" or node.operation in POOLINGS:
            calls.setdefault(_name(node, calls), []).append(node)
    scales = _scales(large or small, dims)
    patch = tuple(small.shapes[0][2:])
    for name, nodes in calls.items():
        value = nodes[0].outputs[0]
        field = None
        if large is not None:
            try:
                field = _field(large, value, scales, dims)
            except NoRule:
                # what comes later meets the same operation
                large = None
        yield _layer(name, nodes, small, field, scales[value], patch)


def _name(node: Node, taken: Mapping[str, list[Node]]) -> str:
    weight = node.arguments.get("weight")
    if isinstance(weight, Constant) and weight.parameter:
        return weight.parameter.removesuffix(".weight")
    name = base = node.module or node.operation
    number = 1
    while name in taken:
        number += 1
        name = f"{base}#{number}"
    return name


def _layer(
    name: str, nodes: Sequence[Node], graph: Graph, field: _Field | None, scale: _Scale | None, patch: Axes
) -> LayerReport:
    node, dims = nodes[0], len(patch)
    before, after = graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]
    # a pooling in 1D runs as one in 2D on maps one voxel high
    numbers = window_rule(node, len(before) - 2)
    kernel, stride, padding, dilation = (tuple(n[-dims:]) for n in numbers)
    transposed = bool(node.arguments.get("transposed"))
    weights = {w.parameter: prod(w.shape) for n in nodes for w in n.arguments.values() if isinstance(w, Constant)}
    dead, share = (0, 0.0) if transposed else _padding(before[-dims:], after[-dims:], kernel, stride, padding, dilation)
    unseen = field is None or max(field.extent) == 0
    extent = patch if field is None or unseen else field.extent
    return LayerReport(
        name=name,
        kind=_kind(node, transposed, before[1]),
        kernel=kernel,
        dilation=dilation,
        effective_kernel=tuple(k + (k - 1) * (d - 1) for k, d in zip(kernel, dilation)),
        stride=stride,
        padding=padding,
        input_size=tuple(before[-dims:]),
        output_size=tuple(after[-dims:]),
        cumulative_stride=None if scale is None else tuple(_number(s) for s in scale.steps),
        receptive_field=extent,
        coverage=1.0 if field is None or unseen else field.coverage,
        sees_whole_image=field is None or field.whole,
        in_channels=before[1],
        out_channels=after[1],
        groups=node.arguments.get("groups", 1),
        parameters=sum(size for parameter, size in weights.items() if parameter),
        multiply_adds=sum(_multiply_adds(graph, n) for n in nodes),
        calls=len(nodes),
        taps=prod(kernel),
        dead_taps=dead,
        padding_share=share,
    )


def _kind(node: Node, transposed: bool, in_channels: int) -> str:
    if node.operation != "convolution":
        return "max pooling" if node.operation.startswith("max") else "average pooling"
    if transposed:
        return "transposed convolution"
    groups = node.arguments["groups"]
    return "depthwise convolution" if groups == in_channels > 1 else "convolution"


def _number(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


def _padding(before: Axes, after: Axes, kernel: Axes, stride: Axes, padding: Axes, dilation: Axes) -> tuple[int, float]:
    """Taps that see nothing but padding, and the share of all products that meet it."""
    alive, inside = 1, 1.0
    for n, m, k, s, p, d in zip(before, after, kernel, stride, padding, dilation):
        places = np.arange(m)[:, None] * s - p + np.arange(k) * d
        shares = ((places >= 0) & (places < n)).mean(axis=0)
        alive *= int((shares > 0).sum())
        inside *= float(shares.mean())
    return prod(kernel) - alive, 1.0 - inside


def _multiply_adds(graph: Graph, node: Node) -> int:
    if node.operation == "convolution":
        weight = node.arguments["weight"]
        shape = graph.shapes[weight.number] if isinstance(weight, Value) else weight.shape
        # every weight meets every voxel: of the output, or, transposed, of the input
        voxels = graph.shapes[node.inputs[0] if node.arguments["transposed"] else node.outputs[0]]
        return int(prod(shape) * voxels[0] * prod(voxels[2:]))
    if node.operation in ("mm", "bmm", "addmm", "baddbmm"):
        names = [
            n
            for n in ("self", "batch1", "mat1")
            if n in node.arguments and ("add" not in node.operation or n != "self")
        ]
        left = node.arguments[names[0]]
        width = graph.shapes[left.number][-1] if isinstance(left, Value) else left.shape[-1]
        return int(prod(graph.shapes[node.outputs[0]]) * width)
    if node.operation.startswith("_scaled_dot_product"):
        queries, keys, values = (graph.shapes[node.arguments[n].number] for n in ("query", "key", "value"))
        return int(prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1]))
    return 0


def _warnings(layers: Sequence[LayerReport], field: _Field | None, strides: Axes, patch: Axes) -> Iterator[str]:
    for layer in layers:
        if layer.dead_taps:
            yield (
                f"{layer.name}: {layer.dead_taps} of {layer.taps} taps see nothing but padding "
                f"(dilation {_by(layer.dilation)} on a map of {_by(layer.input_size)})"
            )
    if field is not None and field.coverage < 1:
        yield f"gridding: {1 - field.coverage:.1%} of the voxels inside the field of view never reach the output voxel"
    if any(s > n for s, n in zip(strides, patch)):
        yield f"the output stride {_by(strides)} is larger than the patch {_by(patch)}: the coarsest map has one voxel"


def _by(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else "×".join(map(str, numbers))
