"""The choice of device and precision, without a GPU at hand."""

from __future__ import annotations

import pytest
import torch

from medseg.device import choose_device, choose_precision, describe, free_bytes, memory_format
from medseg.errors import ConfigError


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_names_of_devices(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, expected: str) -> None:
    with_gpus(monkeypatch, gpus)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:3", "", "mps"])
def test_other_names_are_refused_with_the_ones_there_are(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        choose_device(name)


@pytest.mark.parametrize(("name", "gpus"), [("cuda", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=f"{gpus} CUDA devices found; use --device cpu"):
        choose_device(name)


@pytest.mark.parametrize("wanted", ["32", "bf16"])
def test_a_precision_that_is_asked_for_is_taken(wanted: str) -> None:
    assert choose_precision(wanted, torch.device("cpu")) == wanted


@pytest.mark.parametrize("wanted", ["fp16", "16", ""])
def test_another_precision_is_refused_with_those_there_are(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"--precision {wanted}: expected auto, 32 or bf16"):
        choose_precision(wanted, torch.device("cpu"))


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(False, False, "32"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_auto_takes_bf16_where_a_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "32")])
def test_auto_does_not_take_an_emulated_bf16(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_a_processor_is_described_with_its_threads() -> None:
    assert describe(torch.device("cpu")) == f"cpu ({torch.get_num_threads()} threads)"


def test_memory_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    usual = [torch.contiguous_format, torch.channels_last, torch.channels_last_3d]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert [memory_format(n, cpu) for n in (1, 2, 3)] == usual
    # where oneDNN hangs in it
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert [memory_format(n, cpu) for n in (1, 2, 3)] == [
        torch.contiguous_format,
        torch.contiguous_format,
        torch.channels_last_3d,
    ]
    assert [memory_format(n, gpu) for n in (1, 2, 3)] == usual


def test_free_memory_comes_in_whole_gib_and_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 2**30 + 12345, 8 * 2**30))
    assert free_bytes(torch.device("cuda", 0)) == 7 * 2**30
    assert free_bytes(torch.device("cpu")) is None
