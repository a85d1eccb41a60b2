"""Metrics: one record a logged step, the same numbers in the file, the console and all else.

The clock runs from before the first wait for data and is read once at each logged step, so that an
interval misses nothing: waiting, evaluating, saving and logging all count in `step_seconds`. Loss
and gradient norm stay on the device until a step is logged, since reading them makes the host wait.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from torchtitan.config.schema import Metrics
from torchtitan.metrics.console import ConsoleSink, is_terminal
from torchtitan.metrics.goodput import TimeSplit, earlier_seconds
from torchtitan.metrics.sinks import JsonLinesSink, Record, Sink, TensorBoardSink
from torchtitan.utils.device import device_name, memory_peak, peak_flops, reset_memory_peak

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
RANKS_FOLDER = "metrics"
"""Below the run folder, with `save_for_all_ranks`: the metrics of ranks other than 0."""


class MetricsLogger:
    """Collects the figures of steps and writes records of them.

    Rank 0 writes files and draws the progress bar (with `save_for_all_ranks` every rank writes);
    ranks whose INFO messages are shown print lines. All ranks may call everything; on the others it
    does nothing. `flops_per_token` is by TorchTitan's formula, `flops_per_token_causal` counts only
    the attention that a causal mask leaves. `steps` is the number of steps of the whole run.
    `more_sinks` are opened, under their names, on ranks that write. `clock` gives seconds, of which
    the process has spent `seconds_before`.
    """

    def __init__(
        self,
        section: Metrics,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        flops_per_token: float,
        flops_per_token_causal: float,
        steps: int,
        more_sinks: Mapping[str, Callable[[], Sink]] | None = None,
        seconds_before: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.num_tokens_seen = 0
        """Tokens of all steps of the run so far, over all ranks."""

        self._log_freq = section.log_freq
        self._steps = steps
        self._world_size = world_size
        self._device = device
        self._flops_per_token = flops_per_token
        self._flops_per_token_causal = flops_per_token_causal
        self._peak_flops = _peak_flops(section, device)
        self._clock = clock
        self._started: float | None = None
        self._interval_steps = 0
        self._interval_tokens = 0
        self._spans: dict[str, float] = {"data": 0.0}
        self._split = TimeSplit(clock, seconds_before)
        self._console: ConsoleSink | None = None
        self._sinks: list[Sink] = []
        self._warned: set[str] = set()
        self._file = metrics_file(folder, rank)
        self._writes = rank == 0 or section.save_for_all_ranks
        self._open_sinks(section, folder, rank, more_sinks or {})
        reset_memory_peak(device)

    def resume(self, step: int, num_tokens_seen: int = 0) -> None:
        """Before the first step: the run goes on after `step`; 0 is a fresh start.

        What was logged for later steps is dropped, so that the run has one curve.
        `num_tokens_seen`: that of the checkpoint.
        """
        self.num_tokens_seen = num_tokens_seen
        if self._writes and self._file.is_file():
            try:
                self._split.add(earlier_seconds(self._file, step))
            except OSError as error:
                self._warn("the time of earlier starts", error, "read")
        self._each_sink(lambda sink: sink.resume(step))

    def is_logged(self, step: int) -> bool:
        """Whether the step makes a record: the first, the last and each `log_freq`-th do."""
        return step == 1 or step == self._steps or step % self._log_freq == 0

    def start_step(self) -> None:
        """Call before waiting for the step's data."""
        if self._started is None:
            self._split.start_training()
            self._started = self._clock()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the time within as `<name>_seconds`, the mean per step of the interval, and in the
        split of the run's time as the share of `name`."""
        start = self._clock()
        try:
            with self._split.spent(name):
                yield
        finally:
            self._spans[name] = self._spans.get(name, 0.0) + self._clock() - start

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
        bad_rows: int = 0,
    ) -> None:
        """A step is done. Waits for the device only if the step is logged, on ranks that show it.

        `loss`: the step's mean over its targets on all ranks, `[]`; `grad_norm`: before clipping,
        `[]`; `num_targets`, `num_tokens`: of the step, over all ranks; `loss_terms`: what the loss
        has to say beside, as `loss`; `source_tokens`: of each source of a mixture, of all steps so
        far; `bad_rows`: left out so far, by all lanes.
        """
        assert self._started is not None, "start_step was not called"
        self.num_tokens_seen += num_tokens
        self._interval_steps += 1
        self._interval_tokens += num_tokens
        if self._console is not None:
            self._guarded(self._console, lambda sink: self._advance(step))
        if not self.is_logged(step):
            return
        if self._sinks:
            values = {"loss": float(loss)}
            values |= {f"loss/{name}": float(term) for name, term in (loss_terms or {}).items()}
            values |= {"grad_norm": float(grad_norm), "lr": float(lr)}
            record = self._record(step, values, num_targets)
            for name, count in (source_tokens or {}).items():
                record[f"source_tokens/{name}"] = count
            if bad_rows:
                record["bad_rows"] = bad_rows
            self._each_sink(lambda sink: sink.write(record))
        else:
            self._start_interval(self._clock())

    def log_validation(self, step: int, name: str, loss: Tensor | float, num_targets: int) -> None:
        """The set `name` was evaluated after `step`. Waits for the device on ranks that show it.

        `loss`: mean over the set's `num_targets` targets on all ranks, `[]`.
        """
        if not self._sinks:
            return
        value, place = float(loss), f"validation/{name}"
        record = {
            "step": step,
            f"{place}/loss": value,
            f"{place}/perplexity": _perplexity(value),
            f"{place}/num_targets": num_targets,
        }
        self._each_sink(lambda sink: sink.write(record))

    def flush(self) -> None:
        """Return when every record so far is on the disk; call before a checkpoint commits."""
        self._each_sink(lambda sink: sink.flush())

    def close(self, failed: bool = False) -> None:
        """Write what is left, end the progress bar, and say where the time went. `failed`: an
        error ends the run."""
        sinks, self._sinks, self._console = self._sinks, [], None
        for sink in sinks:
            self._guarded(sink, lambda sink: sink.close(failed))
        if self._started is not None:
            logger.info("Time of the run: %s", self._split.describe())

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    def _record(self, step: int, values: Record, num_targets: int) -> Record:
        """The record of the interval that ends now, the device having been waited for."""
        now = self._clock()
        assert self._started is not None
        seconds = now - self._started
        tokens_per_second = self._interval_tokens / seconds / self._world_size
        spans = {
            f"{name}_seconds": span / self._interval_steps for name, span in self._spans.items()
        }
        memory = memory_peak(self._device)
        record: Record = {
            "step": step,
            **values,
            "num_targets": num_targets,
            "num_tokens_seen": self.num_tokens_seen,
            "tokens_per_second": tokens_per_second,
            "tflops": self._flops_per_token * tokens_per_second / 1e12,
            "mfu": self._utilisation(self._flops_per_token * tokens_per_second),
            "mfu_causal": self._utilisation(self._flops_per_token_causal * tokens_per_second),
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
        reset_memory_peak(self._device)

    def _utilisation(self, flops_per_second: float) -> float | None:
        return None if self._peak_flops is None else flops_per_second / self._peak_flops

    def _open_sinks(
        self,
        section: Metrics,
        folder: Path,
        rank: int,
        more_sinks: Mapping[str, Callable[[], Sink]],
    ) -> None:
        openers: list[tuple[str, Callable[[], Sink]]] = []
        if self._writes:
            openers.append(("metrics.jsonl", lambda: JsonLinesSink(self._file)))
        if self._writes and section.enable_tensorboard:
            tb_folder = folder / section.save_tb_folder
            if section.save_for_all_ranks:
                tb_folder /= f"rank_{rank}"
            openers.append(("TensorBoard", lambda: TensorBoardSink(tb_folder)))
        if self._writes:
            openers += more_sinks.items()
        if logger.isEnabledFor(logging.INFO):
            fancy = is_terminal() and not section.disable_color_printing
            openers.append(("the console", lambda: self._open_console(fancy, fancy and rank == 0)))
        for name, open_sink in openers:
            try:
                self._sinks.append(open_sink())
            except Exception as error:
                self._warn(name, error)

    def _open_console(self, color: bool, bar: bool) -> ConsoleSink:
        self._console = ConsoleSink(self._steps, color=color, bar=bar)
        return self._console

    def _advance(self, step: int) -> None:
        if self._console is not None:
            self._console.advance(step)

    def _each_sink(self, action: Callable[[Any], None]) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, action)

    def _guarded(self, sink: Sink, action: Callable[[Any], None]) -> None:
        """Metrics never stop a run: a failure is reported once for each sink."""
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
        with suppress(Exception):  # whatever it holds: a process, a thread, the terminal
            sink.close(failed=True)

    def _warn(self, name: str, error: Exception, what: str = "written") -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s cannot be %s, training goes on: %r", name, what, error)


def _peak_flops(section: Metrics, device: torch.device) -> float | None:
    """FLOP/s of the device at its best; None, with a line in the log, when nobody knows them."""
    if section.peak_tflops is not None:
        return section.peak_tflops * 1e12
    name = device_name(device)
    known = peak_flops(name)
    if known is None:
        logger.info(
            "No MFU: the peak of this device (%s) is not known. Set metrics.peak_tflops to it.",
            name,
        )
    return known


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def metrics_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its records, below the run folder."""
    return folder / RANKS_FOLDER / f"rank_{rank}.jsonl" if rank else folder / METRICS_FILE
