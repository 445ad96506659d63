"""Engines that run a network: equal to torch, given up with a warning where they are not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.config import DataConfig
from medseg.engines import COMPILED_SHAPES, Run, prepare_network
from medseg.errors import ConfigError
from medseg.model import new_network
from medseg.optional import require
from tests.tiny import tiny_config

CPU = torch.device("cpu")
# one channel in; two labels and the background out
PICTURES = DataConfig(labels={"a": 1, "b": 2}, spatial_dims=2)
with_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="openvino is not installed: pip install 'medseg[openvino]'"
)


class Ramp(nn.Module):
    """Logits (0, x, 2x): the last label where x is positive, the background where it is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images * self.weight


def compiled_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> list[tuple[int, ...]]:
    """Let `torch.compile` give networks whose logits went through `change`; the shapes they have been given."""
    seen: list[tuple[int, ...]] = []

    def compiled(network: nn.Module, **_: Any) -> Run:
        def run(windows: Tensor) -> Tensor:
            seen.append(tuple(windows.shape))
            logits: Tensor = network(windows)
            return change(logits)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    return seen


def fail(logits: Tensor) -> Tensor:
    raise RuntimeError("no C++ compiler found\nand many lines more")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r for r in caplog.records if r.name == "medseg.engines" and r.levelno >= logging.WARNING]
    return [r.getMessage() for r in found]


def windows(width: int = 4) -> Tensor:
    """(1, 1, 2, width): -1, 0, 1, … in each row."""
    return torch.arange(-1.0, width - 1).expand(1, 1, 2, width)


def prepare(name: Any, network: nn.Module | None = None, data: DataConfig = PICTURES) -> Run:
    return prepare_network(name, network or Ramp(), data=data, device=CPU, precision="32")


def test_torch_gives_the_logits_of_the_network() -> None:
    logits = prepare("torch")(windows(3))
    assert logits[0, :, 0].T.tolist() == [[0, -1, -2], [0, 0, 0], [0, 1, 2]]
    assert logits.is_inference()


def test_an_unknown_engine_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ConfigError, match="'tensorrt': expected torch, compile, openvino"):
        prepare("tensorrt")


def test_torch_compile_traces_a_network_of_ours_to_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # the graph is recorded and replayed, but no code is generated: that needs a compiler and minutes
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiler(network, backend="eager", dynamic=False))
    config = tiny_config()
    network = new_network(config)
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    run = prepare("compile", network, config.data)
    run(image)
    torch.testing.assert_close(run(image), prepare("torch", network, config.data)(image))
    assert not warnings_of(caplog)


def test_the_first_windows_of_a_shape_are_run_by_both_and_later_ones_by_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Ramp()
    seen = compiled_as(monkeypatch, lambda logits: logits)
    run = prepare("compile", network)
    run(windows())
    assert (len(seen), network.calls) == (1, 2)
    run(windows())
    assert (len(seen), network.calls) == (2, 3)


def test_a_compiler_that_fails_is_named_once_and_torch_runs_the_network(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = compiled_as(monkeypatch, fail)
    run, plain = prepare("compile"), prepare("torch")
    for width in (4, 4, 5):
        assert torch.equal(run(windows(width)), plain(windows(width)))
    assert len(seen) == 1
    assert warnings_of(caplog) == [
        "engine compile: RuntimeError: no C++ compiler found; torch runs the network instead"
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        # -1 → background, 0 → background (the first of equals), 1 and 2 → the last: swapped in sign only 0 stays
        (lambda logits: -logits, "25.00 % of the labels are those of torch, its logits differ by 200.0 %"),
        (lambda logits: 1.1 * logits, "100.00 % of the labels are those of torch, its logits differ by 10.0 %"),
        (lambda logits: logits * float("nan"), "its logits differ by nan %"),
        (lambda logits: logits[..., :-1], "logits of shape (1, 3, 2, 3), expected (1, 3, 2, 4)"),
    ],
    ids=["labels", "logits", "nan", "shape"],
)
def test_an_engine_that_disagrees_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: Callable[[Tensor], Tensor], told: str
) -> None:
    compiled_as(monkeypatch, change)
    run, plain = prepare("compile"), prepare("torch")
    assert torch.equal(run(windows()), plain(windows()))
    assert torch.equal(run(windows()), plain(windows()))
    (warning,) = warnings_of(caplog)
    assert told in warning


def test_labels_of_regions_are_the_signs_of_their_logits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    labels = {"whole": (1, 2, 3), "core": (2, 3), "rim": (3,)}
    data = DataConfig(labels=labels, region_values=(1, 2, 3), spatial_dims=2)
    # the strongest channel stays, no sign does: 10 where there was -1
    compiled_as(monkeypatch, lambda logits: logits + 10)
    prepare("compile", Ramp(), data)(windows(1))
    assert "engine compile: 0.00 % of the labels" in warnings_of(caplog)[0]


def test_shapes_that_there_is_no_room_for_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compiled_as(monkeypatch, lambda logits: logits)
    run = prepare("compile")
    for width in (4, 5, 6, 7, 4):
        run(windows(width))
    assert [shape[-1] for shape in seen] == [4, 5, 4]
    assert COMPILED_SHAPES == 2


def test_a_failure_after_the_first_windows_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    # running out of memory is for whoever cuts the windows to answer
    calls = []

    def out_of_memory_later(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("none left")
        return logits

    compiled_as(monkeypatch, out_of_memory_later)
    run = prepare("compile")
    run(windows())
    with pytest.raises(torch.OutOfMemoryError):
        run(windows())


def test_openvino_is_refused_on_a_gpu() -> None:
    with pytest.raises(ConfigError, match="found device cuda:1; use --device cpu"):
        prepare_network("openvino", Ramp(), data=PICTURES, device=torch.device("cuda:1"), precision="32")


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"no_such_package.*run `pip install '\.\[some\]'`"):
        require("no_such_package", "some")


@with_openvino
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_openvino_gives_the_logits_of_torch_for_all_shapes(dims: int, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"data": {"spatial_dims": dims}, "windows": {"patch_size": [8] * dims}, "augment": {"flip_axes": []}}
    config = tiny_config(**changes)
    network = new_network(config).eval()
    run, plain = prepare("openvino", network, config.data), prepare("torch", network, config.data)
    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 1, *[8] * dims), (2, 1, *[8] * dims), (1, 1, *[13] * dims)]:
        image = torch.randn(shape, generator=generator)
        run(image)
        # float32 in another order of summation
        torch.testing.assert_close(run(image), plain(image), rtol=1e-4, atol=1e-4)
    assert not warnings_of(caplog)


@with_openvino
def test_a_network_that_openvino_cannot_read_is_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    class Strange(Ramp):
        def forward(self, images: Tensor) -> Tensor:
            # no graph holds what numpy does
            return super().forward(images) * torch.as_tensor(images.numpy().max() + 2)

    network = Strange()
    run = prepare("openvino", network)
    run(windows(4))
    # the largest of the first windows, 2, is a constant of the trace; here it is 4
    assert torch.equal(run(windows(6)), prepare("torch", network)(windows(6)))
    assert len(warnings_of(caplog)) == 1
