"""One forward pass of any network written down as a graph of tensor operations, on tensors without numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]

# the maps keep their shape, the statistics are used by nobody: torch needs a long way to say so
_NORMS = frozenset(("aten::native_batch_norm", "aten::native_group_norm", "aten::native_layer_norm"))
# these take a shape from a tensor, none of its numbers
_PARTIAL_WRITE = "writing into a part of a tensor"
_FRESH = ("_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the image, by its number in the graph."""

    number: int


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the image; `parameters` names the network's own parameter, if it is one."""

    shape: Shape
    parameter: str | None = None


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: its arguments by name, tensors among them as `Value` or `Constant`, and the module that ran it."""

    position: int
    operation: str
    arguments: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    pointwise: bool
    problem: str = ""
    """Why nothing can be said about this operation, where that is so."""


@dataclass
class Graph:
    """Operations in the order in which they ran; `shapes[n]` is the shape of value n; value 0 is the image."""

    nodes: list[Node] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    makers: list[Node | None] = field(default_factory=list)
    output: int = 0

    def new_value(self, shape: Sequence[int], maker: Node | None = None) -> int:
        """The number of a new value."""
        self.shapes.append(tuple(shape))
        self.makers.append(maker)
        return len(self.shapes) - 1


def on_meta(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes but no numbers; `network` stays as it is."""
    tensors = [*network.parameters(), *network.buffers()]
    for module in network.modules():
        tensors += [v for v in vars(module).values() if isinstance(v, Tensor)]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(network, memo).eval()


def record(network: nn.Module, shape: Shape) -> Graph:
    """The graph of one pass of an image of `shape` (batch and channels included) through a network from `on_meta`."""
    recorder = _Recorder(network)
    image = torch.empty(shape, device="meta")
    recorder.see(image)
    with torch.no_grad(), recorder.names(), recorder:
        output = network(image)
    while isinstance(output, list | tuple | dict):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    recorder.graph.output = recorder.result(output)
    return recorder.graph


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what runs.

    Writing into a tensor makes its other views out of date: each storage counts such writes, each tensor remembers the
    count it knows of, and whoever reads one that is behind is marked as a problem.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self._network = network
        self._parameters = {id(p): name for name, p in network.named_parameters()}
        self._values: dict[int, int] = {}
        self._writes: dict[int, int] = {}
        self._known_writes: dict[int, int] = {}
        # an id is only good while its tensor lives
        self._alive: list[Tensor] = []
        self._stack: list[str] = [""]

    def see(self, tensor: Tensor, maker: Node | None = None) -> int:
        """Number `tensor` as a new value."""
        number = self.graph.new_value(tensor.shape, maker)
        self._values[id(tensor)] = number
        self._known_writes[id(tensor)] = self._writes.get(_storage(tensor), 0)
        self._alive.append(tensor)
        return number

    def result(self, tensor: Any) -> int:
        """The number of a tensor that depends on the image; where a part was written since, a node says so."""
        if isinstance(tensor, Tensor) and self._is_behind(tensor):
            number = self.graph.new_value(tensor.shape)
            sources = (self._values.get(id(tensor), 0),)
            node = Node(len(self.graph.nodes), "copy", {}, sources, (number,), "", False, _PARTIAL_WRITE)
            self.graph.makers[number] = node
            self.graph.nodes.append(node)
            return number
        if not isinstance(tensor, Tensor) or id(tensor) not in self._values:
            raise RuntimeError("the output of the network does not depend on its image")
        return self._values[id(tensor)]

    def _is_behind(self, tensor: Tensor) -> bool:
        return self._known_writes.get(id(tensor), 0) < self._writes.get(_storage(tensor), 0)

    @contextmanager
    def names(self) -> Iterator[None]:
        """Keep the name of the running module while inside."""
        handles = []
        for name, module in self._network.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, n=name: self._stack.append(n)))
            handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = func._schema
        given = dict(zip((a.name for a in schema.arguments), args)) | (kwargs or {})
        read = [t for v in given.values() for t in _tensors(v)]
        behind = any(self._is_behind(t) for t in read)
        inputs = tuple(dict.fromkeys(self._values[id(t)] for t in read if id(t) in self._values))
        arguments = {a.name: self._described(given.get(a.name, a.default_value)) for a in schema.arguments}
        if schema.name in _NORMS:
            out = tuple(torch.empty_like(args[0]) for _ in range(3))
        else:
            out = func(*args, **(kwargs or {}))
        produced = list(_tensors(out))
        if not produced or not (inputs or behind) or schema.name.endswith(_FRESH):
            return out
        first = len(self.graph.shapes)
        node = Node(
            position=len(self.graph.nodes),
            operation=schema.name.removeprefix("aten::"),
            arguments=arguments,
            inputs=inputs or (0,),
            outputs=tuple(range(first, first + len(produced))),
            module=self._stack[-1],
            pointwise=torch.Tag.pointwise in func.tags,
            problem=_PARTIAL_WRITE if behind else "",
        )
        if schema.is_mutable and len(read) > 1:
            for argument in schema.arguments:
                written = given.get(argument.name)
                if argument.is_write and isinstance(written, Tensor):
                    self._writes[_storage(written)] = self._writes.get(_storage(written), 0) + 1
        for tensor in produced:
            self.see(tensor, node)
        self.graph.nodes.append(node)
        return out

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in self._values:
                return Value(self._values[id(value)])
            return Constant(tuple(value.shape), self._parameters.get(id(value)))
        if isinstance(value, list | tuple):
            return [self._described(v) for v in value]
        return value


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
