"""The processes that train one network together: who they are, what they share, and how they end; alone there is one.

They are started from outside, by `medseg train --devices N`, torchrun or SLURM; Lightning Fabric tells which it was.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import lightning_fabric
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import nn

from medseg.errors import ConfigError, PeerError, TrainingError
from medseg.whole_batch import of_the_whole_batch, total

Value = TypeVar("Value")

# the others wait while the first process prepares, validates or plans: hours, on a large data set
PATIENCE = timedelta(days=1)


class Ranks:
    """One of `size` processes, number `rank`, on a `device` of its own. Alone: 0 of 1, and nothing is exchanged."""

    def __init__(self, device: torch.device, *, devices: int = 1) -> None:
        """Waits for the others. `device`: what was asked for; `devices`: how many of them on this machine.

        Raises `ConfigError` where the processes that were started cannot train together.
        """
        # its notes on precision and processes repeat what log.txt says
        for name in ("lightning_fabric", "lightning_fabric.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # of kernels one voxel wide, whose strides say nothing
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self._environment = _environment()
        self.rank, self.size, self.device = 0, 1, device
        if self._environment is None:
            if devices > 1:
                raise ConfigError(
                    f"{devices} devices asked for, but this is the only process; start the script with torchrun, or "
                    f"use `medseg train --devices {devices}`"
                )
            return
        self.rank, self.size = self._environment.global_rank(), self._environment.world_size()
        self.device = _own_device(device, self._environment, devices)
        try:
            self.fabric("32")
            # beside that of the gradients, which must not wait for so long
            self._group = dist.new_group(timeout=PATIENCE, backend="gloo")
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"process {self.rank} of {self.size} did not find the others ({error}); start all of them together, "
                "with --devices, torchrun or srun; where the name of a machine does not lead to it, name its network "
                "interface in the variable GLOO_SOCKET_IFNAME"
            ) from error

    def fabric(self, precision: str) -> lightning_fabric.Fabric:
        """What moves a network to the device, computes in `precision` (`bf16` or `32`) and averages gradients."""
        formats: Any = "bf16-mixed" if precision == "bf16" else "32-true"
        if self._environment is None:
            devices: Any = 1 if self.device.type == "cpu" else [self.device.index or 0]
            return lightning_fabric.Fabric(accelerator=self.device.type, devices=devices, precision=formats)
        strategy = DDPStrategy(
            parallel_devices=[self.device],
            cluster_environment=_Seat(self._environment),
            # statistics of batches are those of all processes, so their averages are the same everywhere
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        fabric = lightning_fabric.Fabric(accelerator=self.device.type, strategy=strategy, precision=formats)
        # finds the others the first time, and is a formality then
        fabric.launch()
        return fabric

    def agree(self, asked: str) -> None:
        """Raises `ConfigError` where the processes were not all asked for the same."""
        if len(set(self.gathered(asked))) == 1:
            return
        if not self.first:
            raise PeerError("the processes were started with different command lines; the first one says so")
        raise ConfigError(
            f"the {self.size} processes were started with different command lines, expected one training; trainings "
            "that are independent, such as folds, go into an array of jobs"
        )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, plans, validates and prints."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that this process does. Raises `ConfigError` where one would have none."""
        check_rows(batch_size, self.size)
        return slice(batch_size * self.rank // self.size, batch_size * (self.rank + 1) // self.size)

    def shared(self, value: Value) -> Value:
        """What the first process gave."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    def gathered(self, value: Value) -> list[Value]:
        """What every process gave, in their order."""
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value, group=self._group)
        return held

    def highest(self, *numbers: float) -> list[float]:
        """The largest of what the processes gave, number by number."""
        if self.size == 1:
            return list(numbers)
        held = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self._group)
        return held.tolist()

    def led(self, work: Callable[[], Value]) -> Value:
        """What `work` gives in the first process, which alone does it; an error there is a `PeerError` elsewhere."""
        if self.size == 1:
            return work()
        if not self.first:
            done, value = self.shared((False, None))
            if not done:
                raise PeerError("the first process of this training ended; its message says why")
            return value  # type: ignore[return-value]
        try:
            result = work()
        except BaseException:
            self.shared((False, None))
            raise
        self.shared((True, result))
        return result

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, with its gradient."""
        return values if self.size == 1 else total(values)

    def spread(self, network: nn.Module, batch_size: int) -> nn.Module:
        """The network with batch statistics and dropout of the whole batch, not of the rows of one process."""
        return network if self.size == 1 else of_the_whole_batch(network, self.rows(batch_size), batch_size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A training of all processes. Where another one is lost, what torch says becomes a `PeerError`."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and _says_that_a_peer_is_lost(error):
                said = (str(error).splitlines() or [""])[0]
                raise PeerError(
                    f"another process of this training ended, and its message says why, or the network failed ({said})"
                ) from error
            raise

    def part(self) -> None:
        """The common work is done: the first process goes on alone."""
        if dist.is_initialized():
            if self.size > 1:
                self.highest(0.0)
            dist.destroy_process_group()


def check_rows(batch_size: int, processes: int) -> None:
    """Raises `ConfigError` where some of the `processes` would have no sample of a batch."""
    if batch_size < processes:
        raise ConfigError(
            f"train.batch_size {batch_size} found for {processes} processes, expected at least one sample for "
            f"each: use --set train.batch_size={processes}, or fewer --devices"
        )


class _Seat(ClusterEnvironment):  # type: ignore[misc]
    """An environment in which each process sees one device, its own, however many a node has."""

    def __init__(self, inner: ClusterEnvironment) -> None:
        super().__init__()
        self._inner = inner

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return str(self._inner.main_address)

    @property
    def main_port(self) -> int:
        return int(self._inner.main_port)

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return int(self._inner.world_size())

    def set_world_size(self, size: int) -> None:
        """Whoever started the processes has set it."""

    def global_rank(self) -> int:
        return int(self._inner.global_rank())

    def set_global_rank(self, rank: int) -> None:
        """Whoever started the processes has set it."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return int(self._inner.node_rank())


def _environment() -> ClusterEnvironment | None:
    """Who started several processes; None where this is the only one."""
    try:
        if TorchElasticEnvironment.detect():
            return TorchElasticEnvironment()
        if SLURMEnvironment.detect():
            slurm = SLURMEnvironment()
            return slurm if slurm.world_size() > 1 else None
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the environment of torchrun or SLURM is incomplete ({error})") from error
    return None


def _own_device(device: torch.device, environment: ClusterEnvironment, devices: int) -> torch.device:
    if device.type == "cpu":
        return device
    count, seat = torch.cuda.device_count(), environment.local_rank()
    if devices > count:
        raise ConfigError(f"--devices {devices}: {count} CUDA devices found; ask for fewer, or use --device cpu")
    # a scheduler may show each process its own device only
    index = seat if count > 1 else 0
    if index >= count:
        raise TrainingError(
            f"process {seat} of this machine: {count} CUDA devices found; start {count} processes on it"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _says_that_a_peer_is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ncclComm"))
