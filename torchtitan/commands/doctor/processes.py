"""What the doctor finds out with all processes of a run: do they meet, see the same folder, and how
fast does each axis of their mesh carry data."""

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torchtitan.commands.doctor.bandwidth import AxisSpeed, measure_axes
from torchtitan.commands.doctor.findings import LOOK, Finding
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.context import DistributedContext, open_context
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.preflight.mesh import is_mesh
from torchtitan.utils.device import GIB
from torchtitan.utils.environment import ProcessEnvironment

_UNEVEN = 3.0
"""How many times slower than the fastest group of an axis one may be without a word."""


def run_folder_findings(config: JobConfig) -> Iterator[Finding]:
    """Whether the run folder, or what it would be made in, takes a file, and how much has room."""
    folder, existing = _dump_folder(config), _existing(config)
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
    """All processes must go through; every one gets the same findings."""
    timeout = context.config.comm.init_timeout_seconds
    count = f"{place.world_size} process{'es' if place.world_size > 1 else ''}"
    try:
        with open_context(context.device_type, place, timeout) as world:
            hosts = world.gather_json(socket.gethostname())
            machines = len(set(hosts))
            on = f"on {machines} machine{'s' if machines > 1 else ''}"
            yield Finding(True, "processes", f"{count} {on} have met")
            yield _shared_folder(context.config, world, hosts)
            if not is_mesh(context):
                text = "not measured, as the degrees of [parallelism] do not fit the processes"
                yield Finding(False, "mesh", text, "see the config's problem above, or --check")
                return
            dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
            mesh = dims.build_mesh(world.device.type)
            if world.world_size == 1:
                yield Finding(None, "mesh", "one process, nothing to measure")
            for speed in measure_axes(mesh, dims, world):
                yield axis_finding(speed, hosts)
    except Exception as error:  # whatever kept them from it is the finding
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fix = (
            "see that all machines reach MASTER_ADDR and each other; where they have several"
            " networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
        yield Finding(False, "processes", f"{count} could not work together: {lines[0]}", fix)


def axis_finding(speed: AxisSpeed, hosts: list[str]) -> Finding:
    """One line about an axis; a word where groups differ much, or tp leaves the machine."""
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
    """Rank 0 writes a file, and all look for it."""
    content = secrets.token_hex(8)
    name = f".torchtitan-doctor-{content}"
    mark = _existing(config) / name
    try:
        written = False
        if world.is_main:
            try:
                mark.write_text(content)
                written = True
            except OSError:
                pass
        told = world.broadcast_json({"name": name, "content": content, "written": written})
        seen = _reads(_existing(config) / told["name"], told["content"])
        blind = [rank for rank, sees in enumerate(world.gather_json(seen)) if not sees]
    finally:
        if world.is_main:
            mark.unlink(missing_ok=True)
    if not told["written"]:
        return Finding(None, "shared folder", "not tried, as rank 0 cannot write there")
    if not blind:
        return Finding(True, "shared folder", "all processes see what rank 0 writes there")
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


def _existing(config: JobConfig) -> Path:
    """The run folder, or the nearest one above it that exists."""
    folder = _dump_folder(config)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
