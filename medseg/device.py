"""Which device and which number format to compute with; nothing else knows how to ask."""

from __future__ import annotations

import ctypes
import math
import platform

import torch

from medseg.errors import ConfigError
from medseg.process import machine_memory_bytes

CPU_BATCH_BYTES, MAX_CPU_BATCH = 2**26, 4
MAX_GPU_BATCH = 32
# of features at a time: four times what a residual U-Net of a quarter of its width was seen to take (409); scores are
# there as logits in bf16 and float32 and as probabilities
BYTES_A_VOXEL, BYTES_A_SCORE = 1600, 12
CPU_MEMORY_SHARE = 0.5
# of the CPU; of CUDA, outside of what torch keeps; of cuBLAS and cuDNN
OUT_OF_MEMORY = ("not enough memory", "can't allocate", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
# share of the free memory of a GPU that a batch may take
MEMORY_SHARE = 0.7

PRECISIONS = ("32", "bf16")

_peaks: dict[torch.device, int] = {}


def choose_device(name: str = "auto") -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises `ConfigError` where there is no such device."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or (":" in name and not number.isdecimal()):
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise ConfigError(
            f"--device {name}: {count} CUDA devices found; use --device cpu or install a CUDA build of torch"
        )
    return torch.device("cuda", int(number or 0))


def choose_precision(wanted: str, device: torch.device) -> str:
    """`bf16` or `32`: `auto` takes bf16 where the hardware computes it, not merely emulates it.

    Raises `ConfigError` for another word.
    """
    if wanted not in ("auto", *PRECISIONS):
        raise ConfigError(f"--precision {wanted}: expected auto, {' or '.join(PRECISIONS)}")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    # oneDNN runs bf16 on any processor with AVX-512, but slower than float32 without these instructions
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "32"


def describe(device: torch.device) -> str:
    """The device in words, for logs and run.json."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def hold_memory() -> None:
    """Keep freed memory in the process, on Linux with glibc; elsewhere nothing happens.

    Else every step gives the large maps back to the system and pays page faults to have them again: a tenth of the
    time of a training step on two cores.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    # mallopt(3): M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3
    library = ctypes.CDLL(None)
    library.mallopt(-3, 2**30)
    library.mallopt(-1, 2**31 - 1)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's own on a GPU, that of a GPU's libraries, or the CPU's.

    Only the first has an exception of its own.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Give what torch keeps for later use back to a GPU; on a CPU nothing is kept."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> float | None:
    """Memory that is free on a GPU, in whole GiB: a little more or less must not change a plan. None on a CPU."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.mem_get_info(device)[0] // 2**30 * 2**30)


def batch_that_fits(device: torch.device, scores: torch.Tensor) -> int:
    """How many windows to do at a time, when one has just been done alone and gave `scores` (1, K, *S).

    On a GPU as many as its free memory holds of what the one took at its peak. On a CPU as many as give a fixed size of
    scores: more only cost memory, and a number that depended on it would change the rounding from run to run.
    """
    if device.type != "cuda":
        return max(1, min(MAX_CPU_BATCH, CPU_BATCH_BYTES // (4 * scores.numel())))
    taken = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device) + scores.nbytes
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    fitting = max(1, min(MAX_GPU_BATCH, int(MEMORY_SHARE * free) // max(1, taken)))
    # a power of two: a little more or less free memory must not change it
    return int(2 ** (fitting.bit_length() - 1))


def most_voxels(device: torch.device, channels: int) -> float:
    """Voxels that a network with `channels` outputs may see at a time. A GPU tells by itself when its memory is full.

    On Linux a process that asks a CPU for too much is killed without a word, so what it takes is judged beforehand, and
    by the machine's whole memory: another program's share of it must not change a result.
    """
    memory = machine_memory_bytes()
    if device.type != "cpu" or memory is None:
        return math.inf
    return CPU_MEMORY_SHARE * memory / (BYTES_A_VOXEL + BYTES_A_SCORE * channels)


def beyond_memory(numbers: float) -> str:
    """What that many numbers in float32 take, in words, where it is more than this machine can hold; else empty.

    As `most_voxels`, by all of its memory: a process that asks for too much is killed without a word.
    """
    memory, wanted = machine_memory_bytes(), 4 * numbers
    if memory is None or wanted <= CPU_MEMORY_SHARE * memory:
        return ""
    return f"{wanted / 1e9:.1f} GB, more than {CPU_MEMORY_SHARE:g} of this machine's memory"


def check_held(scores: int, voxels: int) -> None:
    """Raises `OutOfMemoryError` where that many float32 `scores` of each voxel are `beyond_memory`."""
    if taken := beyond_memory(scores * voxels):
        raise torch.OutOfMemoryError(f"{scores} scores of {voxels:,} voxels take {taken}; use smaller windows")


def forget_peak(device: torch.device) -> None:
    """Begin the peak that `batch_that_fits` reads anew; `peak_bytes` remembers."""
    if device.type == "cuda":
        _peaks[device] = peak_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors of this process have held on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return max(_peaks.get(device, 0), torch.cuda.max_memory_allocated(device))


def memory_format(spatial_dims: int, device: torch.device) -> torch.memory_format:
    """Channels last where torch has it: what the convolution kernels of `device` want."""
    # oneDNN of torch 2.13 hangs or aborts in gradients of 1 × 1 convolutions of pictures, with AVX2 and channels last
    # alone (4 × 3 × 16 × 24, stride 2, one channel out)
    if spatial_dims == 2 and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return torch.contiguous_format
    return {2: torch.channels_last, 3: torch.channels_last_3d}.get(spatial_dims, torch.contiguous_format)


def to_memory_format(network: torch.nn.Module, spatial_dims: int, device: torch.device) -> torch.nn.Module:
    """The network with its weights in `memory_format`."""
    return network.to(memory_format=memory_format(spatial_dims, device))  # type: ignore[call-overload,no-any-return]
