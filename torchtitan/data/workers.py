"""Worker processes: lanes served by plain `DataLoader` workers, with states next to samples.

Every sample comes with the next state of its lane, so read-ahead does no harm: the training process
knows the state of each lane after the samples that it used. See `scripts/bench_loader.py` for the
comparison with torchdata.
"""

import atexit
import logging
import math
import multiprocessing
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import resource_tracker
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from torchtitan.config import DataError
from torchtitan.data.mixture import AnyPosition, Mixture
from torchtitan.data.packing import Sample
from torchtitan.data.reading import PLACE_BYTES, READING, Place, describe_place, place_in
from torchtitan.utils.processes import STOP_SIGNALS, end_with_parent, worker_context
from torchtitan.utils.torch_compat import hide_worker_info

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_WARN_SECONDS = 30.0
"""Before the first warning of a row that does not come; each further one after twice the time."""


class _NotYet(Exception):
    """The next item has not come yet. No TimeoutError, which a dataset may raise."""


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

    def __init__(
        self, mixture: Mixture, positions: dict[int, AnyPosition], num_workers: int = 0
    ) -> None:
        self.num_workers = num_workers
        self._mixture = mixture
        self._positions = positions
        self._places: Any = None
        """Shared memory: the place of each worker."""
        if num_workers:
            self._places = worker_context().RawArray("B", num_workers * PLACE_BYTES)

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        # A dataset that cuts itself up by worker would give other rows than without workers.
        hide_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            READING.share(self._memory_of(info.id))
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

    def place(self, worker: int) -> Place:
        """Return the place that a worker has read up to, or this process without workers."""
        return place_in(self._memory_of(worker)) if self.num_workers else READING.place()

    def describe(self, place: Place) -> str:
        """Return source, file and row of a place."""
        settings = self._mixture.sources[place.source]
        where = describe_place(settings.source, settings.shards[place.shard], place.row)
        named = len(self._mixture.names) > 1
        return f"{self._mixture.names[place.source]}: {where}" if named else where

    def _memory_of(self, worker: int) -> memoryview:
        return memoryview(self._places).cast("B")[worker * PLACE_BYTES :]


class SampleStream:
    """Iterate over a LaneDataset, through its worker processes or a thread of this process.

    The number of workers must divide the number of lanes, so that round-robin over the workers is
    round-robin over the lanes.
    """

    def __init__(self, dataset: LaneDataset, prefetch_factor: int | None):
        num_workers = dataset.num_workers
        self.patience = math.inf
        """Seconds after which a row that is being read is given up."""
        self._dataset = dataset
        self._loader: DataLoader[Item] | None = None
        if num_workers:
            self._loader = DataLoader(
                dataset,
                batch_size=None,
                collate_fn=_identity,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                timeout=_POLL_SECONDS,
                worker_init_fn=_prepare_worker,
                multiprocessing_context=worker_context(__name__),
                # Its seeds are drawn from this, and not from the numbers that training may draw.
                generator=torch.Generator(),
            )
        self._iterator: Iterator[Item] | None = None
        self._processes: list[Any] = []
        self._num_given = 0
        self._is_closed = False

    def __next__(self) -> Item:
        """Return the next item.

        Raises DataError, also for a worker that has died, and for a row that cannot be read
        within `patience` seconds.
        """
        if self._iterator is None:
            self._iterator = self._start()
        watch = _Watch(self._dataset, self.patience)
        while True:
            try:
                item = next(self._iterator)
                break
            except _NotYet:
                watch.check(self._worker())
            except RuntimeError as error:
                if str(error).startswith("DataLoader timed out"):
                    watch.check(self._worker())
                elif "DataLoader worker" in str(error):
                    raise DataError(f"a worker process died: {error}") from error
                else:
                    raise
        self._num_given += 1
        if item.error:
            raise DataError(item.error)
        return item

    def reading(self) -> str:
        """Return the source, file and row that the next item waits for; empty if none is read."""
        place = self._dataset.place(self._worker())
        return self._dataset.describe(place) if place.is_reading else ""

    def _worker(self) -> int:
        """Return the worker that makes the next item."""
        return self._num_given % max(1, self._dataset.num_workers)

    def _start(self) -> Iterator[Item]:
        if self._is_closed:
            raise RuntimeError("the loader is closed")
        if self._loader is None:
            return _ReaderThread(self._dataset)
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
        """End the thread or the worker processes."""
        self._is_closed = True
        if isinstance(self._iterator, _ReaderThread):
            self._iterator.close()
        self._iterator = None  # DataLoader asks its workers to leave when the iterator goes
        self._loader = None
        for process in self._processes:
            # They do not hear SIGTERM, so one that is stuck in a read must be killed.
            process.kill()
            process.join()
        self._processes = []


class _ReaderThread(Iterator[Item]):
    """A thread that makes one item when asked for it, so that the main thread can watch it."""

    def __init__(self, dataset: LaneDataset):
        self._requests: SimpleQueue[bool] = SimpleQueue()
        self._answers: SimpleQueue[Item | BaseException] = SimpleQueue()
        self._is_asked = False
        # Not of an executor, for which Python's end would wait: it may be stuck in a read.
        queues = self._requests, self._answers
        self._thread = threading.Thread(
            target=_serve, args=(dataset, *queues), name="data", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._requests.put, False)

    def __next__(self) -> Item:
        """Return the next item. Raises _NotYet if it is to be asked for again."""
        if not self._is_asked:
            self._requests.put(True)
        self._is_asked = True
        try:
            answer = self._answers.get(timeout=_POLL_SECONDS)
        except Empty:
            raise _NotYet from None
        self._is_asked = False
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End the thread, unless it is stuck."""
        self._requests.put(False)
        if not self._is_asked:
            self._thread.join()


def _serve(
    dataset: LaneDataset,
    requests: "SimpleQueue[bool]",
    answers: "SimpleQueue[Item | BaseException]",
) -> None:
    with closing(iter(dataset)) as items:  # type: ignore[type-var]
        while requests.get():
            try:
                answers.put(next(items))
            except BaseException as error:
                answers.put(error)


class _Watch:
    """The time for which one row has been read."""

    def __init__(self, dataset: LaneDataset, patience: float):
        self._dataset = dataset
        self._patience = patience
        self._place = Place()
        self._since = 0.0
        self._next_warning = 0.0

    def check(self, worker: int) -> None:
        """Warn of a row that takes long. Raises DataError when patience is at its end."""
        place, now = self._dataset.place(worker), time.monotonic()
        if place != self._place or not place.is_reading:
            self._place, self._since = place, now
            self._next_warning = min(_WARN_SECONDS, self._patience / 4)
            return
        seconds = now - self._since
        if seconds >= self._patience:
            where = self._dataset.describe(place)
            raise DataError(f"waits for data for {seconds:.0f} s, without a row, from {where}")
        if seconds >= self._next_warning:
            self._next_warning = 2 * seconds
            logger.warning(
                "Waiting for data for %.0f s, from %s", seconds, self._dataset.describe(place)
            )


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
