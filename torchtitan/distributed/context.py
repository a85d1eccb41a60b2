"""`DistributedContext`: the processes of a run, and small messages between them.

Every run has a process group, even with one process, so that there is one code path. The model's
tensors travel over the device's backend (NCCL on CUDA, gloo on the CPU). Small facts (target
counts, data positions, decisions) travel as CPU tensors over a gloo group, so that the host never
waits for the device to learn them.
"""

import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.config.errors import ConfigError, ConfigIssue, HangError
from torchtitan.distributed.roll_call import RollCall, wait_until
from torchtitan.distributed.watchdog import Watchdog
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.torch_compat import OWN_TIMEOUT, all_gather_single, set_group_timeouts

_MEETINGS = itertools.count()
"""Counts the runs of this process, rejected starts included."""
_CONNECT_SECONDS = 5.0
_STORES: dict[tuple[str, str], dist.TCPStore] = {}
"""By address and port. Kept, as the ranks' next run in this process meets there again, and the one
that rank 0 keeps must not end while a slower rank still reads from it."""


@dataclass(frozen=True)
class DistributedContext:
    """The place of this process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control_group: dist.ProcessGroup
    """All ranks, over gloo."""
    roll_call: RollCall | None = None
    """For when this group has failed; None in a run of one process without a launcher."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    """Learns that this rank is alive, from each message to others; does nothing until started."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs, decides and writes the files that exist once."""
        return self.rank == 0

    def watch(self, folder: Path, enabled: bool = True) -> None:
        """Start the watchdog of this run in `folder`, if `enabled`. All ranks must call it."""
        if enabled:
            self.watchdog.start(folder, self.broadcast_json(time.time_ns()))

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's `value`, anything JSON can hold, in rank order.

        Bytes in tensors rather than pickled objects: nothing that arrives can run code. All ranks
        must call it.
        """
        self.watchdog.sign()
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        size = torch.tensor([payload.numel()])
        all_gather_single(sizes, size, self.control_group)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        gathered = torch.zeros(self.world_size * longest, dtype=torch.uint8)
        all_gather_single(gathered, padded, self.control_group)
        rows = gathered.view(self.world_size, longest)
        return [
            json.loads(row[:length].numpy().tobytes())
            for row, length in zip(rows, sizes.tolist(), strict=True)
        ]

    def gather_distinct_json(self, value: Any) -> list[Any]:
        """Return the distinct values among those of the ranks, ordered by the first rank with each.

        A value is anything JSON can hold. Sends each distinct value once, which saves time where
        many ranks have the same large one. All ranks must call it.
        """
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        first: dict[str, int] = {}
        for rank, other in enumerate(self.gather_json(digest)):
            first.setdefault(other, rank)
        return [self.broadcast_json(value, source=rank) for rank in first.values()]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """Return the `value` of rank `source`, anything JSON can hold. All ranks must call it."""
        self.watchdog.sign()
        if self.world_size == 1:
            return json.loads(json.dumps(value))
        payload = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(payload)])
        dist.broadcast(size, src=source, group=self.control_group)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, src=source, group=self.control_group)
        return json.loads(buffer.numpy().tobytes())

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control_group)


def with_own_group(world: DistributedContext, timeout_seconds: int) -> DistributedContext:
    """Return the same processes over a separate gloo group, for a background thread of each.

    Over one group the messages of both threads could be mixed up. `set_timeout` does not change
    `timeout_seconds`. All ranks must call it.
    """
    timeout = timedelta(seconds=timeout_seconds)
    group = dist.new_group(backend="gloo", timeout=timeout, group_desc=OWN_TIMEOUT)
    return replace(world, control_group=group, watchdog=Watchdog())


@contextmanager
def open_context(
    device_type: str, environment: ProcessEnvironment, timeout_seconds: int
) -> Iterator[DistributedContext]:
    """Join the process group that the launcher's variables describe; leave it at the end.

    Without a launcher the world is this one process. `timeout_seconds` bounds every collective, and
    how long ranks wait for each other before that. Raises ConfigError if a rank refuses to start,
    HangError if one does not come.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store: dist.Store = dist.HashStore()
    roll_call = None
    if environment.launched:
        store, roll_call = meet(environment, timeout_seconds)
        roll_call.start(timeout_seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_pg", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
    )
    try:
        with Watchdog(environment.rank, environment.world_size, timeout_seconds) as watchdog:
            yield DistributedContext(
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                local_rank=environment.local_rank,
                device=device,
                control_group=_control_group(backend, timeout),
                roll_call=roll_call,
                watchdog=watchdog,
            )
    finally:
        dist.destroy_process_group()


def require_no_group() -> None:
    """Raise RuntimeError if this process has joined others already: `open_context` does so."""
    if dist.is_initialized():
        text = "torch.distributed is initialised already, and torchtitan joins the ranks by itself"
        raise RuntimeError(f"{text}: call torch.distributed.destroy_process_group() first")


def share_refusal(
    environment: ProcessEnvironment, problems: Sequence[ConfigIssue], seconds: float
) -> bool:
    """Tell all ranks that this one cannot start, so that none waits for it.

    Returns True once rank 0 has answered, False if it does not within `seconds`.
    """
    try:
        _, roll_call = meet(environment, seconds)
        roll_call.start(seconds, problems)
    except ConfigError:
        return True
    except HangError:
        return False
    raise AssertionError("a start with a refusal")


def meet(environment: ProcessEnvironment, seconds: float) -> tuple[dist.Store, RollCall]:
    """Return the store at the launcher's `MASTER_ADDR` and `MASTER_PORT`, and a roll call over it.

    Raises ConfigError if the port cannot be opened, and HangError if nobody answers
    within `seconds`.
    """
    rank, meeting = environment.rank, next(_MEETINGS)
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    nobody = HangError(
        f"nobody answers at {address}:{port} within {seconds:.0f} s: rank 0 has not started, or its"
        " machine cannot be reached from here"
    )
    if (address, port) in _STORES:
        store = _STORES[address, port]
        store.set_timeout(timedelta(seconds=seconds))
        return _meeting_in(store, environment, keeps_store, meeting)
    # A signal ends this wait, whereas TCPStore would go on waiting.
    if not keeps_store and not wait_until(lambda: _answers(address, port), seconds):
        raise nobody
    try:
        store = dist.TCPStore(
            address,
            int(port),
            environment.world_size,
            keeps_store,
            timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (ValueError, dist.DistNetworkError) as error:
        if not keeps_store:
            raise nobody from error
        reason = str(error).splitlines()[0]
        fix = "set it, on all ranks, to a free port of the machine of rank 0"
        problem = ConfigIssue("MASTER_PORT", f"cannot be used: {reason}", fix, port, local=True)
        refusal = ConfigError(problem)
        refusal.known_to_all = True  # nobody can be reached
        raise refusal from error
    _STORES[address, port] = store
    return _meeting_in(store, environment, keeps_store, meeting)


def _meeting_in(
    store: dist.Store, environment: ProcessEnvironment, keeps_store: bool, meeting: int
) -> tuple[dist.Store, RollCall]:
    # A launcher that starts its processes anew keeps its store, and so does one whose processes
    # make a run after another: with what ranks said before, and the addresses they had.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    ours = dist.PrefixStore(f"attempt-{attempt}/meeting-{meeting}", store)
    calls = dist.PrefixStore("roll-call", ours)
    return ours, RollCall(calls, environment.rank, environment.world_size, keeps_store)


def _answers(address: str, port: str) -> bool:
    try:
        with socket.create_connection((address, int(port)), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False
    except (ValueError, OverflowError):
        return True  # not a port: TCPStore says so


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """While entered, this process counts as one of `world_size` whose collectives do nothing.

    They leave their results as they were: for fake tensors only, and not for the messages of
    `DistributedContext`.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def set_timeout(world: DistributedContext, seconds: int) -> None:
    """Change the bound on collectives; all ranks call it, with no collective under way."""
    world.watchdog.sign(timeout=seconds)
    set_group_timeouts(timedelta(seconds=seconds))
    world.barrier()


@contextmanager
def timeout(world: DistributedContext, seconds: int, seconds_after: int) -> Iterator[None]:
    """While entered, collectives may take `seconds`; after it, `seconds_after`. All ranks enter."""
    set_timeout(world, seconds)
    yield
    set_timeout(world, seconds_after)


def _control_group(backend: str, timeout: timedelta) -> dist.ProcessGroup:
    if backend == "gloo":
        group = dist.group.WORLD
        assert group is not None
        return group
    return dist.new_group(backend="gloo", timeout=timeout)
