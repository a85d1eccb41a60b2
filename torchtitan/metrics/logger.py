"""Metrics: one record per logged step, with the same numbers in every sink.

The clock runs from before the first wait for data and is read once per logged step, so that an
interval misses nothing: waiting, evaluating, saving and logging all count in `step_seconds`. Loss
and gradient norm stay on the device until a step is logged, since reading them makes the host wait.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan.config.schema import Metrics
from torchtitan.metrics.console import ConsoleSink, is_terminal
from torchtitan.metrics.goodput import TimeSplit, earlier_seconds
from torchtitan.metrics.rank_times import RankTimes
from torchtitan.metrics.sinks import JsonLinesSink, Record, Sink
from torchtitan.metrics.tensorboard import TensorBoardSink
from torchtitan.utils.device import device_name, memory_peak, peak_flops, reset_memory_peak
from torchtitan.utils.environment import is_dumb_terminal, wants_color

logger = logging.getLogger(__name__)

_LARGEST_EXPONENT = 709.0
METRICS_FILE = "metrics.jsonl"
RANKS_FOLDER = "metrics"
"""Below the run folder, with `save_for_all_ranks`: the metrics of ranks other than 0."""


@dataclass(frozen=True)
class MeasuredRun:
    """The run that is measured, as seen by this rank."""

    folder: Path
    rank: int
    world_size: int
    device: torch.device
    steps: int
    """Steps of the whole run."""
    flops_per_token: float
    """By TorchTitan's formula, which counts attention to all positions."""
    flops_per_token_causal: float
    """The same, counting attention to earlier positions only."""
    seconds_before: float = 0.0
    """Age of the process when the metrics are created."""


class MetricsLogger:
    """Collects the figures of steps and writes records of them.

    Rank 0 writes files and draws the progress bar (with `save_for_all_ranks` every rank writes);
    ranks that show INFO messages print lines. All ranks may call every method. `more_sinks` are
    opened, under their names, on ranks that write. `ranks` compares the ranks' times. `texts` are
    for TensorBoard alone: Markdown by tag.
    """

    def __init__(
        self,
        section: Metrics,
        run: MeasuredRun,
        more_sinks: Mapping[str, Callable[[], Sink]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ranks: RankTimes | None = None,
        texts: Callable[[], Mapping[str, str]] = dict,
    ):
        self.num_tokens_seen = 0
        """Tokens of all steps of the run so far, over all ranks."""

        self._log_freq = section.log_freq
        self._run = run
        self._peak_flops = _peak_flops(section, run.device)
        self._clock = clock
        self._ranks = ranks
        self._texts = texts
        self._step = self._first_step = 0
        self._started: float | None = None
        self._interval_steps = 0
        self._interval_tokens = 0
        self._spans: dict[str, float] = {"data": 0.0}
        self._split = TimeSplit(clock, run.seconds_before)
        self._console: ConsoleSink | None = None
        self._sinks: list[Sink] = []
        self._warned: set[str] = set()
        self._file = metrics_file(run.folder, run.rank)
        self._writes = run.rank == 0 or section.save_for_all_ranks
        self._open_sinks(section, more_sinks or {})
        reset_memory_peak(run.device)

    def resume(self, step: int, num_tokens_seen: int = 0) -> None:
        """Continue the run after `step`, 0 for a fresh start. Call before the first step.

        Drops what was logged for later steps, so that the run has one curve. `num_tokens_seen` is
        that of the checkpoint.
        """
        self.num_tokens_seen, self._step, self._first_step = num_tokens_seen, step, step
        if self._writes and self._file.is_file():
            try:
                self._split.add(earlier_seconds(self._file, step))
            except OSError as error:
                self._warn("the time of earlier starts", error, "read")
        self._each_sink(lambda sink: sink.resume(step))

    def is_logged(self, step: int) -> bool:
        """Return True for steps that make a record: the first, the last and each `log_freq`-th."""
        return step == 1 or step == self._run.steps or step % self._log_freq == 0

    def start_step(self) -> None:
        """Start the clock. Call before waiting for the data of a step."""
        if self._started is None:
            self._split.start_training()
            self._started = self._clock()
            if self._ranks is not None:
                self._ranks.open()
                self._enter()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the time within as `<name>_seconds`, a mean per step, and as a share of the run."""
        start = self._clock()
        try:
            with self._split.spent(name):
                self._enter()
                yield
            self._enter()
        finally:
            self._spans[name] = self._spans.get(name, 0.0) + self._clock() - start

    def _enter(self) -> None:
        if self._ranks is not None:
            self._ranks.enter(self._split.activity, self._step)

    def log_step(
        self,
        step: int,
        *,
        loss: Tensor | float,
        grad_norm: Tensor | float,
        lr: float,
        num_targets: int,
        num_tokens: int,
        loss_terms: Mapping[str, Tensor] | None = None,
        source_tokens: Mapping[str, int] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Count a finished step, and log it if it is due.

        Waits for the device only if the step is logged, on ranks that show it.

        Args:
            step: the number of the step.
            loss: mean over the step's targets on all ranks, `[]`.
            grad_norm: norm before clipping, `[]`.
            lr: learning rate of the step.
            num_targets: targets of the step on all ranks.
            num_tokens: tokens of the step on all ranks.
            loss_terms: further means reported by the loss, by name.
            source_tokens: tokens of each source of a mixture so far.
            counts: rows that all lanes have changed or left out so far, and the like, by name;
                logged from 1 on.
        """
        assert self._started is not None, "start_step was not called"
        self._step = step
        self._enter()
        self.num_tokens_seen += num_tokens
        self._interval_steps += 1
        self._interval_tokens += num_tokens
        if self._console is not None:
            self._guarded(self._console, lambda sink: sink.advance(step))
        if not self.is_logged(step):
            return
        own_times = {} if self._ranks is None else self._ranks.record(self._interval_steps)
        if self._sinks:
            values = {"loss": float(loss)}
            values |= {f"loss/{name}": float(term) for name, term in (loss_terms or {}).items()}
            values |= {"grad_norm": float(grad_norm), "lr": float(lr)}
            record = self._record(step, values, num_targets) | own_times
            for name, count in (source_tokens or {}).items():
                record[f"source_tokens/{name}"] = count
            record |= {name: count for name, count in (counts or {}).items() if count}
            self._each_sink(lambda sink: sink.write(record))
        else:
            self._start_interval(self._clock())

    def log_validation(
        self,
        step: int,
        name: str,
        loss: Tensor | float,
        num_targets: int,
        has_perplexity: bool = True,
        loss_terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Log the evaluation of the set `name` after `step`.

        Waits for the device on ranks that show it. `loss` is the mean over the set's `num_targets`
        targets on all ranks, `[]`; `has_perplexity`: it is in nats a token; `loss_terms`: further
        means reported by the loss, by name. The names of the only set are not doubled.
        """
        if not self._sinks:
            return
        value, place = float(loss), "validation" if name == "validation" else f"validation/{name}"
        record: Record = {"step": step, f"{place}/loss": value}
        if has_perplexity:
            perplexity = math.inf if value > _LARGEST_EXPONENT else math.exp(value)
            record[f"{place}/perplexity"] = perplexity
        record |= {f"{place}/{term}": float(mean) for term, mean in (loss_terms or {}).items()}
        record[f"{place}/num_targets"] = num_targets
        self._each_sink(lambda sink: sink.write(record))

    def log_evaluation(self, step: int, task: str, values: Mapping[str, float]) -> None:
        """Log the metrics of a task after `step`, by name."""
        record: Record = {"step": step}
        record |= {f"evaluation/{task}/{name}": value for name, value in values.items()}
        self._each_sink(lambda sink: sink.write(record))

    def flush(self) -> None:
        """Return when every record is on the disk. Call before a checkpoint commits."""
        self._each_sink(lambda sink: sink.flush())

    def close(self, failed: bool = False) -> None:
        """Close the sinks, and log where the time went. `failed`: an error ends the run."""
        if self._ranks is not None:
            self._ranks.close()
        sinks, self._sinks, self._console = self._sinks, [], None
        for sink in sinks:
            self._guarded(sink, lambda sink: sink.close(failed))
        if self._started is not None:
            logger.info("%s", self._split.describe(self._first_step, self._step))

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        self.close(failed=kind is not None)

    def _record(self, step: int, values: Record, num_targets: int) -> Record:
        """Return the record of the interval that ends now. The device has finished."""
        now = self._clock()
        assert self._started is not None
        seconds = now - self._started
        tokens_per_second = self._interval_tokens / seconds / self._run.world_size
        spans = {
            f"{name}_seconds": span / self._interval_steps for name, span in self._spans.items()
        }
        memory = memory_peak(self._run.device)
        record: Record = {
            "step": step,
            **values,
            "num_targets": num_targets,
            "num_tokens_seen": self.num_tokens_seen,
            "tokens_per_second": tokens_per_second,
            "tflops": self._run.flops_per_token * tokens_per_second / 1e12,
            "mfu": self._utilisation(self._run.flops_per_token * tokens_per_second),
            "mfu_causal": self._utilisation(self._run.flops_per_token_causal * tokens_per_second),
            "step_seconds": seconds / self._interval_steps,
            **spans,
            "data_fraction": self._spans["data"] / seconds,
            **self._split.record(),
            "memory_peak_gib": memory.reserved_gib,
            "memory_peak_fraction": memory.reserved_gib / memory.capacity_gib,
        }
        if memory.active_gib is not None:
            record["memory_active_gib"] = memory.active_gib
            record["memory_active_fraction"] = memory.active_gib / memory.capacity_gib
            record["num_alloc_retries"] = memory.num_alloc_retries
            record["num_ooms"] = memory.num_ooms
        self._start_interval(now)
        return record

    def _start_interval(self, now: float) -> None:
        self._started = now
        self._interval_steps = 0
        self._interval_tokens = 0
        self._spans = {"data": 0.0}
        reset_memory_peak(self._run.device)

    def _utilisation(self, flops_per_second: float) -> float | None:
        return None if self._peak_flops is None else flops_per_second / self._peak_flops

    def _open_sinks(self, section: Metrics, more_sinks: Mapping[str, Callable[[], Sink]]) -> None:
        rank = self._run.rank
        openers: list[tuple[str, Callable[[], Sink]]] = []
        if self._writes:
            openers.append(("metrics.jsonl", lambda: JsonLinesSink(self._file)))
        if self._writes and section.enable_tensorboard:
            openers.append(("TensorBoard", lambda: self._tensorboard(section)))
        if self._writes:
            openers += more_sinks.items()
        if logger.isEnabledFor(logging.INFO):
            fancy = is_terminal() and not section.disable_color_printing
            # A dumb terminal shows no bar, and with it no time left.
            color, bar = fancy and wants_color(), fancy and rank == 0 and not is_dumb_terminal()
            steps, clock = self._run.steps, self._clock
            openers.append(("the console", lambda: ConsoleSink(steps, color, bar, clock)))
        for name, open_sink in openers:
            try:
                self._sinks.append(open_sink())
            except Exception as error:
                self._warn(name, error)
        consoles = (sink for sink in self._sinks if isinstance(sink, ConsoleSink))
        self._console = next(consoles, None)

    def _tensorboard(self, section: Metrics) -> TensorBoardSink:
        run = self._run
        own = run.rank if section.save_for_all_ranks else None
        texts = self._texts if run.rank == 0 else dict
        return TensorBoardSink(run.folder / section.save_tb_folder, run.folder.name, own, texts)

    def _each_sink(self, action: Callable[[Any], None]) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, action)

    def _guarded(self, sink: Sink, action: Callable[[Any], None]) -> None:
        """Metrics never stop a run: a failure is reported once per sink."""
        try:
            action(sink)
        except Exception as error:
            self._warn(sink.name, error)
            if not sink.keeps_trying and sink in self._sinks:
                self._give_up(sink)

    def _give_up(self, sink: Sink) -> None:
        self._sinks.remove(sink)
        if sink is self._console:
            self._console = None
        with suppress(Exception):  # it may hold a process, a thread, the terminal
            sink.close(failed=True)

    def _warn(self, name: str, error: Exception, what: str = "written") -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s cannot be %s, training continues: %r", name, what, error)


def _peak_flops(section: Metrics, device: torch.device) -> float | None:
    """Return the peak FLOP/s of the device; None, with a log line, if unknown."""
    if section.peak_tflops is not None:
        return section.peak_tflops * 1e12
    name = device_name(device)
    known = peak_flops(name)
    if known is None and name != "cpu":  # nobody misses it there
        logger.info(
            "No MFU: the peak of this device (%s) is not known. Set metrics.peak_tflops to it.",
            name,
        )
    return known


def metrics_file(folder: Path, rank: int) -> Path:
    """Return the file that a rank writes its records to."""
    return folder / RANKS_FOLDER / f"rank_{rank}.jsonl" if rank else folder / METRICS_FILE
