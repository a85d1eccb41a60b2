"""A pool of processes that run a function together, joined by gloo.

Importing torch costs seconds per process, so the processes are kept between tests. A function that
fails on one rank leaves the others waiting for it, and one that is no longer waited for answers
later; then all are killed, and the next test gets new ones.
"""

import faulthandler
import functools
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from inspect import isclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.forked import CONTEXT


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


class GlooPool:
    """Processes that run functions of tests, as many as were ever needed."""

    def __init__(self) -> None:
        self._context = CONTEXT
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-pool-")
        self._runs = 0
        self._kept: tuple[int, Any] | None = None
        """Ranks that still have their groups, and for what."""

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 90,
        keep: Any = None,
    ) -> list[Any]:
        """`function(world, *args)` on `world_size` ranks; returns the results in rank order.

        `function` and `args` are pickled, so the function must be importable by name. Where the
        next run has an equal `keep`, it gets the same world, and DTensor's caches still know it.
        """
        if self._kept not in (None, (world_size, keep)):
            self._leave()
        self._kept = None if keep is None else (world_size, keep)
        self._runs += 1
        store = str(Path(self._folder.name) / f"store-{self._runs}")
        self._grow(world_size)
        workers = self._workers[:world_size]
        for rank, (_, connection) in enumerate(workers):
            place = rank, world_size, store, timeout
            connection.send((place, keep is not None, function, args))
        try:
            return self._collect(workers, timeout)
        except BaseException:  # a test's time-out too: the next one would be given these answers
            self.close()
            raise

    def close(self) -> None:
        """Kill all processes."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()
        self._kept = None

    def _leave(self) -> None:
        """End the groups that were kept."""
        assert self._kept is not None
        for _, connection in self._workers[: self._kept[0]]:
            connection.send(None)

    def _where(self, late: list[int]) -> str:
        """The stacks of ranks that do not answer, most recent call first."""
        processes = {rank: self._workers[rank][0] for rank in late}
        for process in processes.values():
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(2)  # until they have written
        return "\n".join(
            f"rank {rank}:\n{_stacks_file(self._folder.name, process.pid).read_text()}"
            for rank, process in processes.items()
        )

    def _grow(self, world_size: int) -> None:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, self._folder.name), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, workers: list[tuple[Any, Connection]], timeout: float) -> list[Any]:
        ranks = {connection: rank for rank, (_, connection) in enumerate(workers)}
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < len(workers):
            waiting = [connection for connection in ranks if ranks[connection] not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(ranks[connection] for connection in waiting)
                raise RankFailure(
                    f"ranks {late} did not answer within {timeout} s\n{self._where(late)}"
                )
            for connection in ready:
                rank = ranks[connection]  # type: ignore[index]
                try:
                    ok, result = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RankFailure(f"rank {rank} died") from None
                if not ok:
                    raise RankFailure(f"rank {rank} failed:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(len(workers))]


def _stacks_file(folder: str, pid: int) -> Path:
    return Path(folder) / f"stacks-{pid}"


def _serve(connection: Connection, folder: str) -> None:
    import torch

    # Written by the handler itself, in C: also while the rank waits for others, or for a lock.
    stacks = _stacks_file(folder, os.getpid()).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks)

    torch.set_num_threads(1)
    gc.freeze()  # or each collection between tests walks through all that torch has imported
    world = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message is None:
            world = _leave()
            gc.collect()
            continue
        place, keeps, function, args = message
        try:
            world = world or _join(*place)
            try:
                result = function(world, *args)
            finally:
                world = world if keeps else _leave()
                gc.collect()  # a model and its mesh are a cycle
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _join(rank: int, world_size: int, store: str, timeout: float) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from torchtitan.distributed.context import DistributedContext

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    group = dist.group.WORLD
    assert group is not None
    return DistributedContext(rank, world_size, rank, torch.device("cpu"), group)


def _leave() -> None:
    """End all groups.

    While a mesh lives, so do gloo's threads (18 on every rank of one with three axes), which wake
    a hundred times a second: after some hundred tests no processor is left to the next.
    """
    import torch.distributed as dist

    dist.destroy_process_group()
    _forget_meshes()


def _forget_meshes() -> None:
    """Empty DTensor's caches, whose keys are meshes, and those of tests.

    The next mesh of that shape would be given groups that are gone, and none would ever be freed.
    """
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    getattr(_redistribute, "_planner_cache", {}).clear()
    for name, module in list(sys.modules.items()):
        if name.startswith(("torch.distributed.tensor", "tests.distributed.tiny")):
            owners = [module, *(value for value in vars(module).values() if isclass(value))]
            for value in [value for owner in owners for value in vars(owner).values()]:
                cached = getattr(value, "__func__", value)  # of a static method
                if isinstance(cached, functools._lru_cache_wrapper):
                    cached.cache_clear()
