"""Worker processes: lanes served by plain `DataLoader` workers, with states next to samples.

Every sample comes with the next state of its lane, so read-ahead does no harm: the training process
knows the state of each lane after the samples that it used. See `scripts/bench_loader.py` for the
comparison with torchdata.
"""

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from torchtitan.config import DataError
from torchtitan.data.mixture import AnyPosition, Mixture
from torchtitan.data.packing import Sample
from torchtitan.utils.processes import STOP_SIGNALS, end_with_parent, worker_context
from torchtitan.utils.torch_compat import hide_worker_info


class Item(NamedTuple):
    """One sample of one lane, or the error that it met instead."""

    lane: int
    sample: Sample | None
    """None when the lane has ended."""
    position: AnyPosition
    """The start of the lane's next sample."""
    error: str = ""


class LaneDataset(IterableDataset[Item]):
    """Samples of the given lanes in rounds, for ever; worker w of W serves every W-th lane."""

    def __init__(self, mixture: Mixture, positions: dict[int, AnyPosition]):
        self._mixture = mixture
        self._positions = positions

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        # A dataset that cuts itself up by worker would give other rows than without workers.
        hide_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        own = list(self._positions.items())[first::step]
        lanes = {index: self._mixture.lane(index, position) for index, position in own}
        try:
            while True:
                for index, lane in lanes.items():
                    # As a value: raised, it would reach the user inside the traceback of a worker.
                    try:
                        sample, error = lane.next_sample(), ""
                    except DataError as problem:
                        sample, error = None, str(problem)
                    yield Item(index, sample, lane.position, error)
        finally:
            for lane in lanes.values():
                lane.close()


class SampleStream:
    """Iterate over a LaneDataset, in this process or through `num_workers` worker processes.

    `num_workers` must divide the number of lanes, so that round-robin over the workers is
    round-robin over the lanes.
    """

    def __init__(self, dataset: LaneDataset, num_workers: int, prefetch_factor: int | None):
        self._loader: DataLoader[Item] | None = DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            worker_init_fn=_prepare_worker,
            multiprocessing_context=worker_context(__name__) if num_workers else None,
            # Its seeds are drawn from this, and not from the numbers that training may draw.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[Item] | None = None
        self._processes: list[Any] = []

    def __next__(self) -> Item:
        """Return the next item. Raises DataError, also for a worker that has died."""
        if self._iterator is None:
            self._iterator = self._start()
        try:
            item = next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a worker process died: {error}") from error
        if item.error:
            raise DataError(item.error)
        return item

    def _start(self) -> Iterator[Item]:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        if not self._loader.num_workers:
            return iter(self._loader)
        before = set(multiprocessing.active_children())
        # The launcher's signals go to the whole process group. Blocked here, they are blocked in
        # what is started here, from its first instruction on: a stop must not take the readers
        # away from a run that is about to save. (The tracker would unblock them when it starts.)
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            iterator = iter(self._loader)
        except ValueError as error:
            # Every tensor is sent as a file descriptor of its own.
            if "too many fds" not in str(error):
                raise
            raise DataError(
                "the dataset holds too many tensors to be sent to worker processes; hold them as"
                " one tensor or as arrays, or set training.dataloader.num_workers = 0"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]
        # Python would wait at its end for readers that do not hear its SIGTERM.
        atexit.register(_close, weakref.ref(self))
        return iterator

    def close(self) -> None:
        """End the worker processes."""
        self._iterator = None  # DataLoader asks its workers to leave when the iterator goes
        self._loader = None
        for process in self._processes:
            # They do not hear SIGTERM, so one that is stuck in a read must be killed.
            process.kill()
            process.join()
        self._processes = []


def workers_for(num_lanes: int, num_workers: int) -> int:
    """Return the largest number of workers up to `num_workers` that divides `num_lanes`."""
    return next((n for n in range(min(num_workers, num_lanes), 0, -1) if num_lanes % n == 0), 0)


def _close(stream: "weakref.ref[SampleStream]") -> None:
    alive = stream()
    if alive is not None:
        alive.close()


def _identity(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    end_with_parent()
