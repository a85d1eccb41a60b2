"""Each rank's own time: that of its steps without the waits for other ranks.

Collectives make all ranks equally slow, whichever of them is late. gloo's make the host wait, so
there the waits can be measured, and the rank that waits least is the one that the others wait for.
NCCL's make the device wait, which no clock of the host sees: on GPUs nothing is measured.
"""

import logging
import time
from contextlib import ExitStack
from statistics import median_low

from torchtitan.distributed.context import DistributedContext
from torchtitan.metrics.goodput import COMPUTE, DATA, STARTUP
from torchtitan.metrics.sinks import Record
from torchtitan.utils.torch_compat import observe_waits

logger = logging.getLogger(__name__)

_WARN_AFTER = 3
"""Logged steps in a row."""


class RankTimes:
    """Measures this rank's own time and compares it with the others'; gives the watchdog its signs.

    `ratio`: that of the slowest rank to the median which is worth a warning; 0 measures nothing.
    All ranks must call every method.
    """

    def __init__(self, world: DistributedContext, ratio: float):
        self._world, self._ratio = world, ratio
        self._measures = ratio > 0 and world.world_size > 1 and world.device.type == "cpu"
        self._activity = STARTUP
        self._booked_until = time.perf_counter()
        self._own = 0.0
        self._slow_rank, self._slow_times = 0, 0
        self._stack = ExitStack()

    def open(self) -> None:
        """Observe the waits of this thread for other ranks from here on."""
        if self._world.world_size > 1:
            # On a GPU those over gloo: a report of a hang tells a rank that waits from one that is
            # stuck.
            self._stack.enter_context(observe_waits(self._before_wait, self._after_wait))

    def close(self) -> None:
        """End the measurement, and with it the part of the run that is watched."""
        self._stack.close()
        self._world.watchdog.end()

    def enter(self, activity: str, step: int) -> None:
        """Note that `activity`, a name of the goodput, begins or goes on after `step`."""
        self._book()
        self._activity = activity
        self._world.watchdog.sign(activity, step)

    def record(self, num_steps: int) -> Record:
        """Return the own times of the last `num_steps` steps; warn of a rank that stays slow."""
        self._book()
        own, self._own = self._own / num_steps, 0.0
        if not self._measures:
            return {}
        times: list[float] = self._world.gather_json(own)
        slowest, median = max(times), median_low(times)
        rank = times.index(slowest)
        is_slow = slowest > self._ratio * median
        same = is_slow and rank == self._slow_rank
        self._slow_rank, self._slow_times = rank, self._slow_times + 1 if same else int(is_slow)
        if self._slow_times == _WARN_AFTER and self._world.is_main:
            logger.warning(
                "Rank %d is slow, and all wait for it: its own time is %.3f s a step, the median's"
                " %.3f s (slow_rank_ratio)",
                rank,
                slowest,
                median,
            )
        return {
            "own_seconds/slowest": slowest,
            "own_seconds/median": median,
            "slowest_rank": rank,
        }

    def _book(self) -> None:
        """Add the time since the last call. Saves and validations are not shared out evenly."""
        now = time.perf_counter()
        if self._activity in (COMPUTE, DATA):
            self._own += now - self._booked_until
        self._booked_until = now

    def _before_wait(self) -> None:
        self._book()
        self._world.watchdog.wait(True)

    def _after_wait(self) -> None:
        self._booked_until = time.perf_counter()
        self._world.watchdog.wait(False)
