"""Findings of all processes of a run: whether they meet and share a folder, and their bandwidth."""

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.commands.doctor.findings import LOOK, Finding
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.context import DistributedContext, open_context
from torchtitan.distributed.parallel_dims import AXES, ParallelDims
from torchtitan.preflight.mesh import is_mesh
from torchtitan.utils.device import GIB, synchronize
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.text import plural
from torchtitan.utils.torch_compat import all_gather_single

_UNEVEN = 3.0
"""A group of an axis this many times slower than the fastest is worth a look."""
MIB = 2**20
_SIZE_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
_REPETITIONS = {"cpu": 3, "cuda": 10}
_LATENCY_REPETITIONS = 20


@dataclass(frozen=True)
class GroupSpeed:
    """The speed of one group of ranks."""

    ranks: tuple[int, ...]
    all_reduce_bytes_per_second: float
    all_gather_bytes_per_second: float
    latency_seconds: float
    """Duration of an all-reduce of one number."""


@dataclass(frozen=True)
class AxisSpeed:
    """The speeds of all groups along an axis of the mesh."""

    axis: str
    groups: tuple[GroupSpeed, ...]

    @property
    def slowest(self) -> GroupSpeed:
        """The group that limits the axis."""
        return min(self.groups, key=lambda group: group.all_reduce_bytes_per_second)

    @property
    def fastest(self) -> GroupSpeed:
        """The fastest group."""
        return max(self.groups, key=lambda group: group.all_reduce_bytes_per_second)


def run_folder_findings(config: JobConfig) -> Iterator[Finding]:
    """Write a file to the run folder, or where it would be created, and measure the free space."""
    folder, existing = _dump_folder(config), existing_folder(config)
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=".torchtitan-doctor-") as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(existing).free / GIB
    except OSError as error:
        text = f"{existing} cannot be written to: {error.strerror or error}"
        fix = "choose another --job.dump_folder, or make this one writable"
        yield Finding(False, "run folder", text, fix)
        return
    where = str(folder) if folder == existing else f"{folder}, not there yet"
    yield Finding(True, "run folder", f"{where}; writable, {free:.1f} GiB free")


def processes_findings(context: RunContext, place: ProcessEnvironment) -> Iterator[Finding]:
    """Yield the findings, the same on all processes. All must iterate."""
    timeout = context.config.comm.init_timeout_seconds
    count = plural(place.world_size, "process")
    try:
        with open_context(context.device_type, place, timeout) as world:
            hosts = world.gather_json(socket.gethostname())
            machines = len(set(hosts))
            on = f"on {machines} machine{'s' if machines > 1 else ''}"
            yield Finding(True, "processes", f"{count} {on} have met")
            yield _shared_folder(context.config, world, hosts)
            if not is_mesh(context):
                text = "not measured: [parallelism] does not fit the number of processes"
                yield Finding(False, "mesh", text, "see the config's problem above, or --check")
                return
            dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
            mesh = dims.build_mesh(world.device.type)
            if world.world_size == 1:
                yield Finding(None, "mesh", "one process, nothing to measure")
            for axis in AXES:
                if getattr(dims, axis) > 1:
                    yield axis_finding(measure_axis(mesh, axis, world), hosts)
    except Exception as error:  # is the finding
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fix = (
            "see that all machines reach MASTER_ADDR and each other; where they have several"
            " networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
        yield Finding(False, "processes", f"{count} could not work together: {lines[0]}", fix)


def measure_axis(
    mesh: DeviceMesh, axis: str, world: DistributedContext, size_bytes: int | None = None
) -> AxisSpeed:
    """Time collectives along one axis, in all of its groups at once, as in training.

    A group is as slow as its slowest rank. Bandwidths are per rank and of the wire, like NCCL's
    "bus bandwidth": in an all-reduce of S bytes over n ranks each sends 2 (n - 1) / n S, in an
    all-gather (n - 1) / n S. All ranks must call it and get the same result.
    """
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
    for times in world.gather_json(mine):
        of_group.setdefault(tuple(times["ranks"]), []).append(times)
    sent = 4 * num_elements * (degree - 1) / degree
    groups = tuple(
        GroupSpeed(
            ranks=ranks,
            all_reduce_bytes_per_second=2 * sent / max(times["reduce"] for times in members),
            all_gather_bytes_per_second=sent / max(times["gather"] for times in members),
            latency_seconds=max(times["latency"] for times in members),
        )
        for ranks, members in of_group.items()
    )
    return AxisSpeed(axis, groups)


def _seconds(operation: Callable[[], None], repetitions: int, world: DistributedContext) -> float:
    """Return the mean duration on this rank, after a warmup; all ranks begin together."""
    for _ in range(2):
        operation()
    synchronize(world.device)
    world.barrier()
    start = time.perf_counter()
    for _ in range(repetitions):
        operation()
    synchronize(world.device)
    return (time.perf_counter() - start) / repetitions


def axis_finding(speed: AxisSpeed, hosts: list[str]) -> Finding:
    """Describe an axis; it is worth a look if groups differ much or tp spans machines."""
    slowest, fastest = speed.slowest, speed.fastest
    groups = f", {len(speed.groups)} groups at once" if len(speed.groups) > 1 else ""
    latency = max(group.latency_seconds for group in speed.groups)
    text = (
        f"all-reduce {slowest.all_reduce_bytes_per_second / 1e9:.2f} GB/s,"
        f" all-gather {min(g.all_gather_bytes_per_second for g in speed.groups) / 1e9:.2f} GB/s,"
        f" latency {latency * 1e6:,.0f} µs ({len(slowest.ranks)} ranks{groups})"
    )
    subject = f"mesh axis {speed.axis}"
    factor = fastest.all_reduce_bytes_per_second / slowest.all_reduce_bytes_per_second
    if factor > _UNEVEN:
        ranks = ", ".join(map(str, slowest.ranks))
        text += f"; the group of ranks {ranks} is {factor:.0f} times slower than the fastest"
        fix = f"look at the links of {', '.join(sorted({hosts[rank] for rank in slowest.ranks}))}"
        return Finding(LOOK, subject, text, fix)
    if speed.axis == "tp" and len({hosts[rank] for rank in slowest.ranks}) > 1:
        text += "; its groups span machines, and each layer waits for them"
        fix = "keep parallelism.tensor_parallel_degree to the devices of one machine"
        return Finding(LOOK, subject, text, fix)
    return Finding(True, subject, text)


def _shared_folder(config: JobConfig, world: DistributedContext, hosts: list[str]) -> Finding:
    """Let rank 0 write a file, and look for it on all ranks."""
    content = secrets.token_hex(8)
    name = f".torchtitan-doctor-{content}"
    mark = existing_folder(config) / name
    try:
        written = False
        if world.is_main:
            try:
                mark.write_text(content)
                written = True
            except OSError:
                pass
        sent = world.broadcast_json({"name": name, "content": content, "written": written})
        seen = _reads(existing_folder(config) / sent["name"], sent["content"])
        blind = [rank for rank, sees in enumerate(world.gather_json(seen)) if not sees]
    finally:
        if world.is_main:
            mark.unlink(missing_ok=True)
    if not sent["written"]:
        return Finding(None, "shared folder", "not checked: rank 0 cannot write there")
    if not blind:
        return Finding(True, "shared folder", "all processes see the files of rank 0")
    where = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in blind[:4])
    text = f"{len(blind)} of {world.world_size} processes see another one: {where}"
    fix = "put job.dump_folder, by its full path, on a file system that all machines mount"
    return Finding(False, "shared folder", text, fix)


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False


def _dump_folder(config: JobConfig) -> Path:
    return Path(config.job.dump_folder).absolute()


def existing_folder(config: JobConfig) -> Path:
    """Return the run folder, or the nearest existing parent."""
    folder = _dump_folder(config)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
