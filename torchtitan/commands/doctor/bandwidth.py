"""How fast the axes of a mesh carry data: collectives of some size, timed.

All groups of an axis are busy at once, as in training, so links that they share are shared here. A
group is as slow as its slowest rank, an axis as its slowest group. Bandwidths are per rank and of
the wire, as NCCL's tests give them ("bus bandwidth"): of an all-reduce of S bytes over n ranks each
rank has to send 2 (n - 1) / n S, of an all-gather (n - 1) / n S, so different n compare.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import AXES, ParallelDims
from torchtitan.utils.device import synchronize
from torchtitan.utils.torch_compat import all_gather_single

MIB = 2**20
_SIZE_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
_REPETITIONS = {"cpu": 3, "cuda": 10}
_LATENCY_REPETITIONS = 20


@dataclass(frozen=True)
class GroupSpeed:
    """Of one group of ranks. Bytes and seconds."""

    ranks: tuple[int, ...]
    all_reduce_bytes_per_second: float
    all_gather_bytes_per_second: float
    latency_seconds: float
    """Of an all-reduce of a single number."""


@dataclass(frozen=True)
class AxisSpeed:
    """Of all groups along an axis of the mesh."""

    axis: str
    groups: tuple[GroupSpeed, ...]

    @property
    def slowest(self) -> GroupSpeed:
        """The group that the others wait for."""
        return min(self.groups, key=lambda group: group.all_reduce_bytes_per_second)

    @property
    def fastest(self) -> GroupSpeed:
        """The group that shows what could be."""
        return max(self.groups, key=lambda group: group.all_reduce_bytes_per_second)


def measure_axes(
    mesh: DeviceMesh, dims: ParallelDims, world: DistributedContext
) -> Iterator[AxisSpeed]:
    """Each axis that has more than one rank, one after the other. All ranks must go through."""
    for axis in AXES:
        if getattr(dims, axis) > 1:
            yield measure_axis(mesh, axis, world)


def measure_axis(
    mesh: DeviceMesh, axis: str, world: DistributedContext, size_bytes: int | None = None
) -> AxisSpeed:
    """The speed along one axis. All ranks must call it, and all get the same answer."""
    group = mesh[axis].get_group()
    degree, kind = group.size(), world.device.type
    num_elements = (size_bytes or _SIZE_BYTES[kind]) // 4 // degree * degree
    whole = torch.zeros(num_elements, device=world.device)
    part = torch.zeros(num_elements // degree, device=world.device)
    one = torch.zeros(1, device=world.device)

    def reduce_whole() -> None:
        dist.all_reduce(whole, group=group)

    def gather_whole() -> None:
        all_gather_single(whole, part, group)

    def reduce_one() -> None:
        dist.all_reduce(one, group=group)

    mine = {
        "ranks": dist.get_process_group_ranks(group),
        "reduce": _seconds(reduce_whole, _REPETITIONS[kind], world),
        "gather": _seconds(gather_whole, _REPETITIONS[kind], world),
        "latency": _seconds(reduce_one, _LATENCY_REPETITIONS, world),
    }
    of_group: dict[tuple[int, ...], list[dict[str, float]]] = {}
    for told in world.gather_json(mine):
        of_group.setdefault(tuple(told["ranks"]), []).append(told)
    sent = 4 * num_elements * (degree - 1) / degree
    groups = tuple(
        GroupSpeed(
            ranks=ranks,
            all_reduce_bytes_per_second=2 * sent / max(told["reduce"] for told in members),
            all_gather_bytes_per_second=sent / max(told["gather"] for told in members),
            latency_seconds=max(told["latency"] for told in members),
        )
        for ranks, members in of_group.items()
    )
    return AxisSpeed(axis, groups)


def _seconds(operation: Callable[[], None], repetitions: int, world: DistributedContext) -> float:
    """Mean duration on this rank, once the connections are there; all ranks begin together."""
    for _ in range(2):
        operation()
    synchronize(world.device)
    world.barrier()
    start = time.perf_counter()
    for _ in range(repetitions):
        operation()
    synchronize(world.device)
    return (time.perf_counter() - start) / repetitions
