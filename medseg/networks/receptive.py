"""What a network sees and costs, layer by layer: kernels, strides, fields of view, gridding, multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from math import lcm, log, prod
from typing import Any

import numpy as np
from torch import nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError, MedsegError
from medseg.networks import build_bare
from medseg.networks._fields import INTERPOLATIONS, POOLINGS, Dependence, NoRule, depend, reach, window_rule
from medseg.networks._sets import Vector, dense, element, volume
from medseg.networks._trace import Constant, Graph, Node, Value, on_meta, record
from medseg.progress import Progress, silent

__all__ = ["LayerReport", "NetworkReport", "analyse", "build_bare", "count", "field_at", "fit_width"]

Axes = tuple[int, ...]

# sides of the images that are tried until the field of view fits inside: nothing is computed on them
_SIDES = (256, 1024, 4096, 16384)
# output voxels whose fields are compared, where strides and interpolation make them differ
_MAX_PHASES = 64
_BUILDS = 10
# after these nobody knows which axes are those of the image
_RESHAPES = (
    *("view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "select"),
    *("unbind", "stack", "bmm", "mm", "addmm", "baddbmm", "pixel_shuffle", "pixel_unshuffle", "repeat", "scatter"),
)
# what counts as "not far above" a target
_ABOVE = 1.02


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One convolution or pooling; all tuples have one number for each axis.

    `output_size` is O = (I + 2P − d(K − 1) − 1) / S + 1 at the given patch, the last two also of a transposed
    convolution. `cumulative_stride` is in voxels of the image, None behind a mean over the whole image, and
    `receptive_field` is then the patch. `dead_taps` see nothing but padding; `padding_share` is the share of all
    products of tap and output voxel that meet padding. A layer that runs `calls` times is given with its largest stride
    and field, and with the sizes of the call where most taps are dead. Where `field_is_exact` is false the field is not
    known, at most the patch.
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
    field_is_exact: bool
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
    `field_is_exact` is false, a warning says why and the field is given as the whole patch. An output stride is at
    least 1, that of the image, and a fraction only where the network resizes by one.
    """

    name: str
    spatial_dims: int
    in_channels: int
    patch: Axes
    parameters: int
    multiply_adds: int
    output_stride: float
    output_strides: tuple[float, ...]
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
    sized: str = ""


def analyse(
    network: nn.Module,
    *,
    spatial_dims: int,
    in_channels: int,
    shape: Sequence[int],
    name: str = "",
    progress: Progress = silent,
) -> NetworkReport:
    """Everything about a network at a patch of `shape`, which is left untouched. Raises `DataError` as the network."""
    bare = on_meta(network)
    patch = tuple(shape)
    parameters = sum(p.numel() for p in bare.parameters())
    small = record(bare, (1, in_channels, *patch))
    large, field, warnings = _whole_field(bare, small, spatial_dims, in_channels)
    layers = tuple(_layers(small, large, spatial_dims, progress))
    strides = [layer.cumulative_stride for layer in layers if layer.cumulative_stride is not None]
    coarsest = tuple(max((1, *(s[axis] for s in strides))) for axis in range(spatial_dims))
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
            if field.sized:
                reason = f"the windows of {field.sized} grow with the image"
                break
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
    extents, coverages, whole, clipped, sized = [(0,) * dims], [1.0], False, False, ""
    for step in steps:
        voxel = [min(n - 1, n // 2 // period * period + step) for n in shape[2:]]
        found = depend(graph, value, element(shape, (None, None, *voxel)))
        whole |= found.sees_whole_image
        sized = sized or found.sized
        spans = reach(found.products, range(2, 2 + dims))
        if spans is None:
            continue
        extent = tuple(last - first + 1 for first, last in spans)
        extents.append(extent)
        clipped |= any(first == 0 or last == n - 1 for (first, last), n in zip(spans, graph.shapes[0][2:]))
        coverages.append(_coverage(found, extent))
    return _Field(tuple(map(max, zip(*extents))), min(coverages), whole, clipped, sized)


def _coverage(found: Dependence, extent: Axes) -> float:
    return volume(found.products, range(2, 2 + len(extent))) / prod(extent)


@dataclass(frozen=True)
class _Scale:
    """Voxels of the image from one voxel of a tensor to the next, by axis; all those on the way there.

    Not `placed`: a reshaped tensor, where nobody knows which axes are those of the image; the rest is about the tensor
    that it was made from.
    """

    steps: tuple[Fraction, ...]
    size: Axes
    passed: frozenset[tuple[Fraction, ...]]
    placed: bool = True

    @property
    def period(self) -> int:
        """Voxels of the tensor after which its fields repeat."""
        return lcm(*((p / s).numerator for passed in self.passed for p, s in zip(passed, self.steps)))

    def moved(self, ratios: Sequence[Fraction], size: Axes) -> _Scale:
        """Of a tensor of `size` whose voxels are `ratios` times as far apart."""
        steps = tuple(s * r for s, r in zip(self.steps, ratios))
        return _Scale(steps, size, self.passed | {steps})

    def at(self, size: Axes) -> _Scale:
        """Of a tensor of `size` with the axes of the image in their places."""
        if self.placed:
            return self
        return self.moved([_clean(n, m) for n, m in zip(self.size, size)], size)


def _clean(before: int, after: int) -> Fraction:
    """The ratio of two sizes: a whole number or one over it, where less than one voxel too many or too few says so."""
    ratio = round(Fraction(max(before, after), min(before, after)))
    if abs(min(before, after) * ratio - max(before, after)) >= ratio:
        return Fraction(before, after)
    return Fraction(ratio) if before >= after else Fraction(1, ratio)


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
        passed = frozenset[tuple[Fraction, ...]]().union(*(s.passed for s in known))
        first = next((s for s in known if s.placed), known[0])
        found = _after(graph, node, _Scale(first.steps, first.size, passed, first.placed), image)
        if found.placed and max(found.size) == 1 and max(image) > 1 and len(shape) >= dims + 2:
            continue
        for output in node.outputs:
            scales[output] = found
    last = scales[graph.output]
    if last is not None and len(graph.shapes[graph.output]) == dims + 2:
        scales[graph.output] = last.at(tuple(graph.shapes[graph.output][2:]))
    return scales


def _after(graph: Graph, node: Node, before: _Scale, image: Axes) -> _Scale:
    """The scale after a node, from that of its input."""
    dims = len(image)
    name, shape = node.operation, graph.shapes[node.outputs[0]]
    source = tuple(graph.shapes[node.inputs[0]][-dims:])
    size = tuple(shape[-dims:])
    if name == "convolution" or name in POOLINGS:
        _, stride, _, _ = window_rule(node, len(graph.shapes[node.inputs[0]]) - 2)
        ratios = [Fraction(s) for s in stride[-dims:]]
        return before.at(source).moved([1 / r for r in ratios] if node.arguments.get("transposed") else ratios, size)
    if name in INTERPOLATIONS or name.startswith(("_adaptive", "adaptive")):
        before = before.at(source)
        if all(n % m == 0 for n, m in zip(image, size)):
            # back on a grid of the image, whatever padding or cutting was on the way
            steps = tuple(Fraction(n, m) for n, m in zip(image, size))
            return _Scale(steps, size, before.passed | {steps})
        less = 1 if node.arguments.get("align_corners") else 0
        pairs = [(max(n - less, 1), max(m - less, 1)) for n, m in zip(source, size)]
        return before.moved([Fraction(n, m) if less else _clean(n, m) for n, m in pairs], size)
    same_layout = len(shape) == len(graph.shapes[node.inputs[0]]) == dims + 2
    if name in _RESHAPES or not (before.placed and same_layout):
        # a sum takes the layout of its inputs
        keeps = before.placed and same_layout and tuple(shape[2:]) == source
        return before if keeps else _Scale(before.steps, before.size, before.passed, False)
    if name == "slice" and node.arguments["dim"] % len(shape) >= 2:
        axis = node.arguments["dim"] % len(shape) - 2
        return before.moved([Fraction(node.arguments["step"] if a == axis else 1) for a in range(dims)], size)
    if max(size) == 1:
        return _Scale(before.steps, size, before.passed)
    return before.moved([Fraction(1)] * dims, size)


def _calls(graph: Graph) -> dict[str, list[Node]]:
    """The convolutions and poolings by name, every call of them."""
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.operation == "convolution" or node.operation in POOLINGS:
            calls.setdefault(_name(node, calls), []).append(node)
    return calls


def _layers(small: Graph, large: Graph | None, dims: int, progress: Progress) -> Iterator[LayerReport]:
    """Sizes and costs from the graph at the patch, fields from the one of an image without borders, if there is one."""
    calls, wide = _calls(small), {} if large is None else _calls(large)
    if [(n, len(c)) for n, c in calls.items()] != [(n, len(c)) for n, c in wide.items()]:
        # layers that come and go with the size cannot be told from one another
        large, wide = None, calls
    scales, at_patch = _scales(large or small, dims), _scales(small, dims)
    patch = tuple(small.shapes[0][2:])
    for number, (name, nodes) in enumerate(calls.items()):
        progress("inspect", number, len(calls), name)
        values = [node.outputs[0] for node in wide[name]]
        field = None
        if large is not None:
            try:
                field = _largest([_field(large, value, scales, dims) for value in values])
            except NoRule:
                # what comes later meets the same operation
                large = None
        if field is not None and field.sized:
            here = [at_patch[node.outputs[0]] for node in nodes]
        else:
            here = [scales[value] for value in values]
        steps = [scale.steps for scale in here if scale is not None]
        yield _layer(name, nodes, small, field, tuple(map(max, zip(*steps))) if steps else None, patch)


def _largest(found: Sequence[_Field]) -> _Field:
    return _Field(
        tuple(map(max, zip(*(f.extent for f in found)))),
        min(f.coverage for f in found),
        any(f.whole for f in found),
        any(f.clipped for f in found),
        next((f.sized for f in found if f.sized), ""),
    )


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
    name: str,
    nodes: Sequence[Node],
    graph: Graph,
    field: _Field | None,
    steps: tuple[Fraction, ...] | None,
    patch: Axes,
) -> LayerReport:
    dims = len(patch)
    node = max(nodes, key=lambda n: _unused(graph, n, dims)[0])
    before, after = graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]
    kernel, stride, padding, dilation = _window(graph, node, dims)
    transposed = bool(node.arguments.get("transposed"))
    weights = {w.parameter: prod(w.shape) for n in nodes for w in n.arguments.values() if isinstance(w, Constant)}
    dead, share = _unused(graph, node, dims)
    exact = field is not None and not field.clipped and not field.sized
    if not exact:
        field = None
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
        cumulative_stride=None if steps is None else tuple(_number(s) for s in steps),
        receptive_field=extent,
        coverage=1.0 if field is None or unseen else field.coverage,
        sees_whole_image=field is None or field.whole,
        field_is_exact=exact,
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


def _window(graph: Graph, node: Node, dims: int) -> tuple[Axes, Axes, Axes, Axes]:
    # a pooling in 1D runs as one in 2D on maps one voxel high
    kernel, stride, padding, dilation = window_rule(node, len(graph.shapes[node.inputs[0]]) - 2)
    return tuple(kernel[-dims:]), tuple(stride[-dims:]), tuple(padding[-dims:]), tuple(dilation[-dims:])


def _unused(graph: Graph, node: Node, dims: int) -> tuple[int, float]:
    """Dead taps and the share of padding of one call."""
    if node.arguments.get("transposed"):
        return 0, 0.0
    before, after = graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]
    return _padding(before[-dims:], after[-dims:], *_window(graph, node, dims))


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


def _warnings(
    layers: Sequence[LayerReport], field: _Field | None, strides: Sequence[float], patch: Axes
) -> Iterator[str]:
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


def _by(numbers: Sequence[float]) -> str:
    words = [f"{n:g}" for n in numbers]
    return words[0] if len(set(words)) == 1 else "×".join(words)
