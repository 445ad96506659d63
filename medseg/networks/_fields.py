"""From an element of a tensor back to what it depends on: one rule for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np

from medseg.networks._sets import (
    Axis,
    Product,
    TooComplex,
    Vector,
    bounds,
    flat,
    indices,
    is_empty,
    ones,
    reshape,
    unite,
)
from medseg.networks._trace import Graph, Node, Shape, Value

Found = Iterator[tuple[int, Product]]
Rule = Callable[[Graph, Node, int, Product], Found]

# comparisons of grids of taps after which a field is too complex to be worth the wait
_MAX_EFFORT = 8_000
# weights of an interpolation below this are rounding
_NOTHING = 1e-6


class NoRule(Exception):  # noqa: N818 - says why an analysis ends, and never leaves the networks
    """An operation of which nothing is known; its name is the message."""


@dataclass(frozen=True)
class Dependence:
    """What an element depends on in the image, and whether it also depends on a mean over all of it."""

    products: tuple[Product, ...]
    sees_whole_image: bool
    sized: str = ""
    """The operation whose windows grow with the image, where there is one on the way."""


def depend(graph: Graph, value: int, start: Product) -> Dependence:
    """What the elements `start` of `value` depend on in the image. Raises `NoRule`.

    What only the statistics of a norm mix does not count, and a mean over the whole image is noted, not followed.
    """
    sets: dict[int, list[Product]] = {value: [start]}
    whole, effort, sized = False, 0, ""
    maker = graph.makers[value]
    last = len(graph.nodes) if maker is None else maker.position + 1
    for node in reversed(graph.nodes[:last]):
        for place, output in enumerate(node.outputs):
            for product in sets.pop(output, ()):
                if _is_image_pooling(graph, node):
                    whole = True
                    continue
                sized = sized or _sized(graph, node)
                try:
                    for source, found in _carry(graph, node, place, product):
                        if found is not product and is_empty(found):
                            continue
                        effort += 1 + len(sets.setdefault(source, []))
                        if effort > _MAX_EFFORT:
                            raise NoRule(f"{node.operation} (too many grids of taps)")
                        unite(sets[source], found)
                except TooComplex as error:
                    raise NoRule(f"{node.operation} ({error})") from error
    return Dependence(tuple(sets.get(0, ())), whole, sized)


def _carry(graph: Graph, node: Node, place: int, product: Product) -> Found:
    name = node.operation
    if node.problem:
        raise NoRule(node.problem)
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is None and node.pointwise:
        rule = _pointwise
    if rule is None:
        raise NoRule(name)
    return rule(graph, node, place, product)


def _is_image_pooling(graph: Graph, node: Node) -> bool:
    if node.operation not in REDUCTIONS and not node.operation.startswith(("_adaptive", "adaptive")):
        return False
    before, after = graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]
    if len(before) < len(graph.shapes[0]) or max(before[2:]) == 1:
        return False
    if node.operation in REDUCTIONS:
        reduced = _reduced(node, len(before))
        return all(axis in reduced for axis in range(2, len(before)) if before[axis] > 1) and 1 not in reduced
    return max(after[2:]) == 1


def _sized(graph: Graph, node: Node) -> str:
    """Words for an adaptive pooling to more than one voxel, whose windows follow the size of the image."""
    if RULES.get(node.operation) is not _adaptive_pooling:
        return ""
    before, after = graph.shapes[node.inputs[0]][2:], graph.shapes[node.outputs[0]][2:]
    if not any(1 < m != n for n, m in zip(before, after)):
        return ""
    return f"adaptive pooling to {'×'.join(map(str, after))} voxels"


def _source(node: Node, name: str) -> int:
    value = node.arguments.get(name)
    if not isinstance(value, Value):
        raise NoRule(f"{node.operation} of a constant")
    return value.number


def _first(node: Node) -> int:
    return _source(node, next(iter(node.arguments)))


def _values(node: Node) -> Iterator[int]:
    for argument in node.arguments.values():
        for item in argument if isinstance(argument, list) else (argument,):
            if isinstance(item, Value):
                yield item.number


def _pointwise(graph: Graph, node: Node, place: int, product: Product) -> Found:
    for number in dict.fromkeys(_values(node)):
        yield number, _narrowed(product, graph.shapes[node.outputs[place]], graph.shapes[number])


def _narrowed(product: Product, shape: Shape, to: Shape) -> Product:
    """The elements of a tensor of shape `to` that broadcasting repeats into those of `product`."""
    if shape == to:
        return product
    missing = len(shape) - len(to)
    if missing < 0:
        raise NoRule("broadcasting to fewer axes")
    return tuple((ones(1),) if n == 1 and m > 1 else axis for axis, m, n in zip(product[missing:], shape[missing:], to))


def _same(graph: Graph, node: Node, place: int, product: Product) -> Found:
    """The first tensor, element by element: norms, whose statistics do not count."""
    yield _first(node), product


def _copy(graph: Graph, node: Node, place: int, product: Product) -> Found:
    source = node.arguments["src"]
    if isinstance(source, Value):
        yield source.number, _narrowed(product, graph.shapes[node.outputs[0]], graph.shapes[source.number])


def _layer_norm(graph: Graph, node: Node, place: int, product: Product) -> Found:
    # the normalised axes are channels, and mixing these is what the layer does
    kept = len(product) - len(node.arguments["normalized_shape"])
    shape = graph.shapes[_first(node)]
    yield _first(node), (*product[:kept], *((ones(n),) for n in shape[kept:]))


def _per_axis(value: Any, dims: int, default: Sequence[int] | None = None) -> list[int]:
    numbers = list(value) if isinstance(value, list) else [value]
    if not numbers and default is not None:
        return list(default)
    return numbers * dims if len(numbers) == 1 else numbers


def window_rule(node: Node, dims: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel (convolutions: of the weight), stride, padding and dilation by axis of a convolution or a pooling."""
    arguments = node.arguments
    if "weight" in arguments:
        weight = arguments["weight"]
        if isinstance(weight, Value):
            raise NoRule("a convolution with computed weights")
        kernel = list(weight.shape[2:])
    else:
        kernel = _per_axis(arguments["kernel_size"], dims)
    stride = _per_axis(arguments["stride"], dims, kernel)
    return kernel, stride, _per_axis(arguments["padding"], dims), _per_axis(arguments.get("dilation", 1), dims)


def _window(vector: Vector, size: int, kernel: int, stride: int, padding: int, dilation: int) -> Vector:
    """Inputs of the windows at the places `vector`."""
    if kernel == stride == 1 and padding == 0 and len(vector) == size:
        return vector
    found = (np.flatnonzero(vector) * stride - padding)[:, None] + np.arange(kernel) * dilation
    return indices(size, found[(found >= 0) & (found < size)])


def _owners(vector: Vector, size: int, kernel: int, stride: int, padding: int, dilation: int) -> Vector:
    """Windows that contain any of the places `vector`: what a transposed convolution reads."""
    found = (np.flatnonzero(vector) + padding)[:, None] - np.arange(kernel) * dilation
    found = found[found % stride == 0] // stride
    return indices(size, found[(found >= 0) & (found < size)])


def _convolution(graph: Graph, node: Node, place: int, product: Product) -> Found:
    number = _source(node, "input")
    shape = graph.shapes[number]
    dims = len(shape) - 2
    back = _owners if node.arguments["transposed"] else _window
    groups, out_channels = node.arguments["groups"], graph.shapes[node.outputs[0]][1]
    channels = ones(shape[1])
    if groups > 1:
        used = flat(product[1]).reshape(groups, out_channels // groups).any(axis=1)
        channels = used.repeat(shape[1] // groups)
    yield number, (product[0], (channels,), *_each_axis(back, product[2:], shape[2:], *window_rule(node, dims)))


def _each_axis(back: Callable[..., Vector], axes: Sequence[Axis], sizes: Shape, *numbers: list[int]) -> list[Axis]:
    # axes are mostly alike: each kind is worked out once
    done: dict[Any, Axis] = {}
    result = []
    for axis, size, *rest in zip(axes, sizes, *numbers):
        vector = flat(axis)
        key = (id(vector), size, *rest)
        if key not in done:
            done[key] = (back(vector, size, *rest),)
        result.append(done[key])
    return result


def _pooling(graph: Graph, node: Node, place: int, product: Product) -> Found:
    number = _first(node)
    shape = graph.shapes[number]
    dims = len(node.arguments["kernel_size"])
    kept = len(shape) - dims
    yield number, (*product[:kept], *_each_axis(_window, product[kept:], shape[kept:], *window_rule(node, dims)))


def _adaptive_pooling(graph: Graph, node: Node, place: int, product: Product) -> Found:
    number = _first(node)
    shape, size = graph.shapes[number], node.arguments["output_size"]
    kept = len(shape) - len(size)

    def back(vector: Vector, n: int, m: int) -> Vector:
        spans = (range(floor(i * n / m), ceil((i + 1) * n / m)) for i in np.flatnonzero(vector))
        return indices(n, [i for span in spans for i in span])

    yield number, (*product[:kept], *_each_axis(back, product[kept:], shape[kept:], size))


def _interpolation(graph: Graph, node: Node, place: int, product: Product) -> Found:
    number = _first(node)
    shape, out = graph.shapes[number], graph.shapes[node.outputs[0]]
    factors = [f for name, f in node.arguments.items() if name.startswith("scales")]
    align = bool(node.arguments.get("align_corners", False))
    kind = node.operation

    def back(vector: Vector, n: int, m: int, factor: float | None) -> Vector:
        chosen = np.flatnonzero(vector)
        step = 1 / factor if factor else n / m
        if "nearest" in kind:
            shift = 0.5 if "exact" in kind else 0.0
            return indices(n, np.minimum(np.floor((chosen + shift) * step + _NOTHING), n - 1).astype(int))
        if align:
            source = chosen * ((n - 1) / (m - 1) if m > 1 else 0.0)
        else:
            source = np.maximum((chosen + 0.5) * step - 0.5, 0.0)
        lower = np.minimum(np.floor(source + _NOTHING).astype(int), n - 1)
        between = lower[(source - lower > _NOTHING) & (lower < n - 1)]
        return indices(n, np.concatenate((lower, between + 1)))

    yield number, (*product[:2], *_each_axis(back, product[2:], shape[2:], list(out[2:]), factors))


def _cat(graph: Graph, node: Node, place: int, product: Product) -> Found:
    parts = node.arguments["tensors"]
    axis = node.arguments["dim"] % len(product)
    vector, start = flat(product[axis]), 0
    for part in parts:
        size = graph.shapes[part.number][axis] if isinstance(part, Value) else part.shape[axis]
        if isinstance(part, Value):
            yield part.number, (*product[:axis], (vector[start : start + size],), *product[axis + 1 :])
        start += size


def _stack(graph: Graph, node: Node, place: int, product: Product) -> Found:
    axis = node.arguments["dim"] % len(product)
    for part, chosen in zip(node.arguments["tensors"], flat(product[axis])):
        if chosen and isinstance(part, Value):
            yield part.number, (*product[:axis], *product[axis + 1 :])


def _placed(product: Product, axis: int, vector: Vector) -> Product:
    return (*product[:axis], (vector,), *product[axis + 1 :])


def _slice(graph: Graph, node: Node, place: int, product: Product) -> Found:
    a = node.arguments
    axis = a["dim"] % len(product)
    vector = np.zeros(graph.shapes[_first(node)][axis], dtype=bool)
    vector[a["start"] : a["end"] : a["step"]] = flat(product[axis])
    yield _first(node), _placed(product, axis, vector)


def _select(graph: Graph, node: Node, place: int, product: Product) -> Found:
    shape = graph.shapes[_first(node)]
    axis, index = node.arguments["dim"] % len(shape), node.arguments["index"]
    yield _first(node), (*product[:axis], (indices(shape[axis], index),), *product[axis:])


def _unbind(graph: Graph, node: Node, place: int, product: Product) -> Found:
    shape = graph.shapes[_first(node)]
    axis = node.arguments["dim"] % len(shape)
    yield _first(node), (*product[:axis], (indices(shape[axis], place),), *product[axis:])


def _split(graph: Graph, node: Node, place: int, product: Product) -> Found:
    axis = node.arguments["dim"] % len(product)
    start = sum(graph.shapes[n][axis] for n in node.outputs[:place])
    vector = np.zeros(graph.shapes[_first(node)][axis], dtype=bool)
    vector[start : start + graph.shapes[node.outputs[place]][axis]] = flat(product[axis])
    yield _first(node), _placed(product, axis, vector)


def _view(graph: Graph, node: Node, place: int, product: Product) -> Found:
    number = _first(node)
    for found in reshape(product, graph.shapes[node.outputs[place]], graph.shapes[number]):
        yield number, found


def _permute(graph: Graph, node: Node, place: int, product: Product) -> Found:
    order = [axis % len(product) for axis in node.arguments["dims"]]
    yield _first(node), tuple(product[order.index(axis)] for axis in range(len(order)))


def _transpose(graph: Graph, node: Node, place: int, product: Product) -> Found:
    axes: list[Axis] = list(product)
    i, j = (node.arguments[k] % len(axes) for k in ("dim0", "dim1")) if len(node.arguments) > 1 else (0, len(axes) - 1)
    axes[i], axes[j] = axes[j], axes[i]
    yield _first(node), tuple(axes)


def _expand(graph: Graph, node: Node, place: int, product: Product) -> Found:
    yield _first(node), _narrowed(product, graph.shapes[node.outputs[0]], graph.shapes[_first(node)])


def _repeat(graph: Graph, node: Node, place: int, product: Product) -> Found:
    shape = graph.shapes[_first(node)]
    kept = product[len(product) - len(shape) :]
    found: list[Vector] = [np.logical_or.reduce(flat(axis).reshape(-1, n), axis=0) for axis, n in zip(kept, shape)]
    yield _first(node), tuple((vector,) for vector in found)


def _pad(graph: Graph, node: Node, place: int, product: Product) -> Found:
    number = _first(node)
    amounts = node.arguments.get("pad", node.arguments.get("padding"))
    axes = list(product)
    for n, before in enumerate(amounts[::2]):
        axis = len(axes) - 1 - n
        size = graph.shapes[number][axis]
        chosen = np.flatnonzero(flat(axes[axis])) - before
        if node.operation.startswith("reflection"):
            chosen = np.abs(chosen)
            chosen = size - 1 - np.abs(size - 1 - chosen)
        elif node.operation.startswith("replication"):
            chosen = np.clip(chosen, 0, size - 1)
        axes[axis] = (indices(size, chosen[(chosen >= 0) & (chosen < size)]),)
    yield number, tuple(axes)


def _roll(graph: Graph, node: Node, place: int, product: Product) -> Found:
    if not node.arguments["dims"]:
        raise NoRule("roll of a flattened tensor")
    axes = list(product)
    for shift, axis in zip(node.arguments["shifts"], node.arguments["dims"]):
        axes[axis] = (np.roll(flat(axes[axis]), -shift),)
    yield _first(node), tuple(axes)


def _flip(graph: Graph, node: Node, place: int, product: Product) -> Found:
    axes = list(product)
    for axis in node.arguments["dims"]:
        turned: Vector = np.flip(flat(axes[axis]))
        axes[axis] = (turned,)
    yield _first(node), tuple(axes)


def _reduced(node: Node, dims: int) -> list[int]:
    given = node.arguments.get("dim")
    if given is None or given == []:
        return list(range(dims))
    return [axis % dims for axis in (given if isinstance(given, list) else [given])]


def _reduction(graph: Graph, node: Node, place: int, product: Product) -> Found:
    shape = graph.shapes[_first(node)]
    reduced = _reduced(node, len(shape))
    axes = iter(product)
    keeps = len(product) == len(shape)
    result: list[Axis] = []
    for axis, size in enumerate(shape):
        if axis in reduced:
            result.append((ones(size),))
            if keeps:
                next(axes)
        else:
            result.append(next(axes))
    yield _first(node), tuple(result)


def _along(graph: Graph, node: Node, place: int, product: Product) -> Found:
    """Every element along one axis: softmax, cumulative sums, sorting."""
    shape = graph.shapes[_first(node)]
    axis = node.arguments["dim"] % len(shape)
    yield _first(node), _placed(product, axis, ones(shape[axis]))


def _matrices(graph: Graph, node: Node, place: int, product: Product) -> Found:
    """Products of matrices: row and column."""
    names = [n for n in ("self", "batch1", "mat1", "mat2", "batch2", "vec") if n in node.arguments]
    if "add" in node.operation:
        bias = node.arguments["self"]
        names.remove("self")
        if isinstance(bias, Value):
            yield bias.number, _narrowed(product, graph.shapes[node.outputs[0]], graph.shapes[bias.number])
    left, right = (node.arguments[n] for n in names)
    if isinstance(left, Value):
        yield left.number, (*product[:-1], (ones(graph.shapes[left.number][-1]),))
    if isinstance(right, Value):
        yield right.number, (*product[:-2], (ones(graph.shapes[right.number][-2]),), product[-1])


def _attention(graph: Graph, node: Node, place: int, product: Product) -> Found:
    if place > 0:
        raise NoRule(node.operation)
    for name in ("query", "key", "value"):
        number = _source(node, name)
        length, width = graph.shapes[number][-2:]
        rows = product[-2] if name == "query" else (ones(length),)
        yield number, (*product[:-2], rows, (ones(width),))


def _glu(graph: Graph, node: Node, place: int, product: Product) -> Found:
    axis = node.arguments["dim"] % len(product)
    vector = flat(product[axis])
    yield _first(node), _placed(product, axis, np.concatenate((vector, vector)))


def _shuffle(graph: Graph, node: Node, place: int, product: Product) -> Found:
    """torch's own pixel shuffle and unshuffle, 2D: split, turn, merge."""
    number = _first(node)
    coarse, fine = graph.shapes[number], graph.shapes[node.outputs[0]]
    backwards = node.operation == "pixel_unshuffle"
    factor = node.arguments["downscale_factor" if backwards else "upscale_factor"]
    if backwards:
        coarse, fine = fine, coarse
    *batch, channels, height, width = fine
    n = len(batch)
    split = (*batch, channels, factor, factor, height // factor, width // factor)
    turned = (*batch, channels, height // factor, factor, width // factor, factor)
    order = [*range(n + 1), n + 3, n + 1, n + 4, n + 2]
    if backwards:
        for part in reshape(product, coarse, split):
            for found in reshape(tuple(part[axis] for axis in order), turned, fine):
                yield number, found
        return
    for part in reshape(product, fine, turned):
        for found in reshape(tuple(part[order.index(axis)] for axis in range(len(order))), split, coarse):
            yield number, found


def _scatter(graph: Graph, node: Node, place: int, product: Product) -> Found:
    """Unpooling: each voxel depends on the pooled voxel of its window, and on what chose the place within it."""
    chosen = _source(node, "index")
    if isinstance(node.arguments["self"], Value):
        yield _source(node, "self"), product
    maker = graph.makers[chosen]
    while maker is not None and RULES.get(maker.operation) in (_view, _pointwise):
        chosen = _first(maker)
        maker = graph.makers[chosen]
    if maker is None or maker.operation not in POOLINGS_WITH_PLACES or chosen != maker.outputs[1]:
        raise NoRule(node.operation)
    large, small = graph.shapes[_first(maker)], graph.shapes[chosen]
    dims = len(maker.arguments["kernel_size"])
    kept = len(large) - dims
    shape = graph.shapes[node.outputs[0]]
    for part in reshape(product, shape, (*shape[:2], *large[kept:])):
        axes = _each_axis(_owners, part[2:], small[kept:], *window_rule(maker, dims))
        found = (*part[:2], *axes)
        for name in ("src", "index"):
            source = _source(node, name)
            for back in reshape(found, (*shape[:2], *small[kept:]), graph.shapes[source]):
                yield source, back


def reach(products: Sequence[Product], axes: Sequence[int]) -> list[tuple[int, int]] | None:
    """First and last index on each of `axes`, None for the empty set."""
    found = [bounds(products, axis) for axis in axes]
    return [b for b in found if b is not None] if found and found[0] is not None else None


POOLINGS_WITH_PLACES = ("max_pool2d_with_indices", "max_pool3d_with_indices")
POOLINGS = (*POOLINGS_WITH_PLACES, "avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool3d")
REDUCTIONS = ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod", "linalg_vector_norm")
INTERPOLATIONS = (
    *(f"upsample_nearest{d}d" for d in (1, 2, 3)),
    *(f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
)
_BY_RULE: dict[Rule, tuple[str, ...]] = {
    _pointwise: (
        *("clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "_prelu_kernel", "native_dropout"),
        *("where", "masked_fill", "clamp", "fill", "zero", "dropout"),
    ),
    _same: (
        *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        *("_batch_norm_no_update", "cudnn_batch_norm", "native_group_norm"),
    ),
    _copy: ("copy",),
    _layer_norm: ("native_layer_norm", "_fused_rms_norm"),
    _convolution: ("convolution",),
    _pooling: POOLINGS,
    _adaptive_pooling: (
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    ),
    _interpolation: INTERPOLATIONS,
    _cat: ("cat",),
    _stack: ("stack",),
    _slice: ("slice",),
    _select: ("select",),
    _unbind: ("unbind",),
    _split: ("split", "split_with_sizes"),
    _view: ("view", "_unsafe_view", "unsqueeze", "squeeze", "_reshape_alias"),
    _permute: ("permute",),
    _transpose: ("transpose", "t"),
    _expand: ("expand",),
    _repeat: ("repeat",),
    _pad: ("constant_pad_nd", *(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3))),
    _roll: ("roll",),
    _flip: ("flip",),
    _reduction: REDUCTIONS,
    _along: ("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk"),
    _matrices: ("mm", "bmm", "addmm", "baddbmm"),
    _attention: (
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math"),
    ),
    _glu: ("glu",),
    _shuffle: ("pixel_shuffle", "pixel_unshuffle"),
    _scatter: ("scatter",),
}
RULES: dict[str, Rule] = {name: rule for rule, names in _BY_RULE.items() for name in names}
