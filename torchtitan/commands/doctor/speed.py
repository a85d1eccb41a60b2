"""Findings about the speed of this machine: settings that would be faster, as measured here.

Candidates are measured in turns, so that other programs slow all of them alike, and one is advised
only if it is faster in three rounds of four by more than noise. On a GPU only number formats are
compared; that has not been tried on one.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.commands.doctor.findings import LOOK, Finding
from torchtitan.config.errors import ConfigError, DataError
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.decoder.model import Decoder
from torchtitan.models.registry import get_family
from torchtitan.utils.device import num_cores, synchronize
from torchtitan.utils.dtypes import default_dtype, torch_dtype
from torchtitan.utils.host import tune_cpu_allocator
from torchtitan.utils.text import format_bytes, plural

C = TypeVar("C", bound=Hashable)
Seconds = Mapping[C, Sequence[float]]
"""The durations of each candidate, by round."""

NOISE = 1.1
"""A candidate that is not this many times as fast is not advised."""
_WORTH_SECONDS = 1.0
"""A save that keeps the loop waiting for less is not worth a setting."""
_MOST_ROUNDS, _LEAST_ROUNDS, _BUDGET_SECONDS = 9, 3, 1.5
_MODELS = {
    "cpu": DecoderArgs(dim=256, n_layers=2, n_heads=8, vocab_size=256),
    "cuda": DecoderArgs(dim=4096, n_layers=2, n_heads=32, vocab_size=32000),
}
_TOKENS = {"cpu": (2, 256), "cuda": (4, 2048)}
"""Sequences and their length."""
_FREED_BYTES = 64 * 2**20
_WRITTEN_BYTES, _PIECE_BYTES, _WRITE_SECONDS = 64 * 2**20, 8 * 2**20, 2.0
_ADAMS = ("Adam", "AdamW")


def speed_findings(context: RunContext, folder: Path, has_config: bool) -> Iterator[Finding]:
    """Yield the findings. `folder`: the run folder, or where it would be created."""
    kind, config = context.device_type, context.config
    if kind == "cuda" and not torch.cuda.is_available():
        return  # a finding of its own
    try:
        busy = busy_finding(os.getloadavg()[0], num_cores())
        if kind == "cpu":
            yield from [busy] if busy else []
            if config.debug.cpu_allocator == "system":
                yield allocator_finding(*_measured_allocator())
        in_use = config.training.mixed_precision_param
        seconds = in_turns({dtype: _step(kind, dtype) for dtype in ("bfloat16", "float32")})
        yield format_finding(in_use, seconds, math.prod(_TOKENS[kind]))
        if kind == "cpu" and num_cores() > 1:
            yield threads_finding(torch.get_num_threads(), _measured_threads(in_use), bool(busy))
        write, copy = _write_rate(folder), _copy_rate()
        num_bytes = _checkpoint_bytes(context) if has_config else None
        yield save_finding(config.checkpoint, num_bytes, write, copy)
    except (OSError, RuntimeError) as error:
        yield Finding(None, "speed", f"not measured: {str(error).strip() or type(error).__name__}")


def gain(now: Sequence[float], other: Sequence[float]) -> tuple[float, bool]:
    """Return how many times as fast `other` is, in the median, and True if it is beyond noise."""
    ratios = sorted(mine / its for mine, its in zip(now, other))
    return statistics.median(ratios), ratios[len(ratios) // 4] >= NOISE


def format_finding(in_use: str, seconds: Seconds[str], tokens: int) -> Finding:
    """Compare bfloat16 with float32, given the tokens of a step."""
    rates = [f"{tokens / statistics.median(seconds[name]):,.0f}" for name in seconds]
    text = f"{' and '.join(rates)} tokens/s of a small Llama in {' and '.join(seconds)}"
    subject = "speed of number formats"
    if in_use not in seconds:
        return Finding(None, subject, text)
    other = next(name for name in seconds if name != in_use)
    ratio, is_gain = gain(seconds[in_use], seconds[other])
    if not is_gain:
        return _without_gain(subject, text, ratio)
    fix = f'set training.mixed_precision_param = "{other}"'
    fix += ", which rounds more" if other == "bfloat16" else ""
    return Finding(LOOK, subject, f"{text}: {other} is {ratio:.1f} times as fast", fix)


def _without_gain(subject: str, text: str, ratio: float) -> Finding:
    """Report a candidate that is not advised: it is slower, or perhaps only on a noisy machine."""
    if ratio >= NOISE:
        return Finding(None, subject, f"{text}; too noisy to advise, measure again")
    return Finding(True, subject, f"{text}; nothing to gain")


def threads_finding(in_use: int, seconds: Seconds[int], busy: bool) -> Finding:
    """Compare numbers of threads of one process. `busy`: with other programs, so it will change."""
    others = [number for number in seconds if number != in_use]
    best = min(others, key=lambda number: statistics.median(seconds[number]))
    ratio, is_gain = gain(seconds[in_use], seconds[best])
    subject, now = "speed of threads", plural(in_use, "thread")
    if not is_gain:
        text = f"{now}: {1 / ratio:.1f} times as fast as {best}"
        return _without_gain(subject, text, ratio)
    text = f"{plural(best, 'thread')}: {ratio:.1f} times as fast as {now}"
    if busy:
        return Finding(None, subject, f"{text} beside the other programs")
    return Finding(LOOK, subject, text, f"set debug.threads = {best}, for one process")


def allocator_finding(system: Sequence[float], tuned: Sequence[float]) -> Finding:
    """Compare what memory costs from the system's allocator with what it costs once tuned."""
    ratio, is_gain = gain(system, tuned)
    subject = "speed of the allocator"
    if is_gain:
        text = f"memory taken anew is {ratio:.1f} times as fast once glibc keeps it"
        return Finding(LOOK, subject, text, 'set debug.cpu_allocator = "tuned"')
    return _without_gain(subject, f"tuned {ratio:.1f} times as fast", ratio)


def save_finding(
    section: Checkpoint, num_bytes: int | None, write_rate: float, copy_rate: float
) -> Finding:
    """Report how long a save of `num_bytes` keeps training waiting; rates are bytes a second."""
    subject, text = "speed of the run folder", f"{format_bytes(write_rate)}/s, synced"
    if num_bytes is None or not section.enable:
        return Finding(None, subject, text)
    written, copied = num_bytes / write_rate, num_bytes / copy_rate
    text += f": {written:.1f} s for a checkpoint of {format_bytes(num_bytes)}"
    if section.async_mode != "disabled":
        return Finding(True, subject, f"{text}, while training goes on")
    text += f", for which training waits every {plural(section.interval, 'step')}"
    if written - copied < _WORTH_SECONDS or written < NOISE * copied:
        return Finding(True, subject, f"{text}; nothing to gain")
    text += f"; it would wait {copied:.1f} s for a copy in memory"
    fix = f'set checkpoint.async_mode = "async"; it needs {format_bytes(num_bytes)} of host memory'
    return Finding(LOOK, subject, text, fix)


def busy_finding(load: float, cores: int) -> Finding | None:
    """Report programs that take a good part of the cores, which no setting makes up for."""
    if load < cores / 2:
        return None
    text = f"other programs compute, too (load {load:.1f} on {plural(cores, 'core')})"
    fix = "stop them, if they are yours; what follows is measured beside them"
    return Finding(LOOK, "speed of this machine", text, fix)


def in_turns(candidates: Mapping[C, Callable[[], object]]) -> dict[C, list[float]]:
    """Time the candidates one after the other, after a warmup, round by round."""
    started = time.perf_counter()
    for run in candidates.values():
        run()
    seconds: dict[C, list[float]] = {name: [] for name in candidates}
    for round_ in range(_MOST_ROUNDS):
        if round_ >= _LEAST_ROUNDS and time.perf_counter() - started > _BUDGET_SECONDS:
            break
        for name, run in candidates.items():
            seconds[name].append(_seconds(run))
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _step(kind: str, dtype: str) -> Callable[[], None]:
    """Return forward and backward of a small Llama."""
    with torch.device(kind), default_dtype(torch_dtype(dtype)):
        model = Decoder(_MODELS[kind])
        inputs = torch.randint(256, _TOKENS[kind])
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    parameters, head = list(model.parameters()), model.get_parameter("output.weight")
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)

    def run() -> None:
        logits = F.linear(model(inputs, positions), head)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), inputs.flatten())
        torch.autograd.grad(loss, parameters)
        synchronize(inputs.device)

    return run


def _measured_threads(dtype: str) -> dict[int, list[float]]:
    before, step = torch.get_num_threads(), _step("cpu", dtype)

    def with_threads(number: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(number)
            step()

        return run

    numbers = {before, 1, max(1, num_cores() // 2), num_cores()}
    try:
        return in_turns({number: with_threads(number) for number in sorted(numbers)})
    finally:
        torch.set_num_threads(before)


def _measured_allocator() -> tuple[list[float], list[float]]:
    """Return the durations before and after glibc is tuned, which cannot be undone."""

    def run() -> None:
        torch.empty(_FREED_BYTES, dtype=torch.uint8).zero_()

    before = in_turns({"system": run})["system"]
    tune_cpu_allocator()
    return before, in_turns({"tuned": run})["tuned"]


def _write_rate(folder: Path) -> float:
    """Return the bytes a second that reach the disk."""
    piece, written = os.urandom(_PIECE_BYTES), 0
    with tempfile.TemporaryFile(dir=folder, prefix=".torchtitan-doctor-", buffering=0) as file:
        start = time.perf_counter()
        while written < _WRITTEN_BYTES and time.perf_counter() - start < _WRITE_SECONDS:
            written += file.write(piece)
            os.fsync(file.fileno())
        return written / (time.perf_counter() - start)


def _copy_rate() -> float:
    source = torch.zeros(_FREED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: target.copy_(source)})["copy"]
    return _FREED_BYTES / statistics.median(seconds)


def _checkpoint_bytes(context: RunContext) -> int | None:
    """Return the size of weights and Adam's two moments; None if others are saved, or unknown."""
    config = context.config
    if config.optimizer.name not in _ADAMS or set(config.model.handlers) - {"compile"}:
        return None
    try:
        family = get_family(config.model.name)
        vocab_size = build_tokenizer(config.model.tokenizer_path).vocab_size
        args = family.resolve(config.model, vocab_size)
    except (ConfigError, DataError):  # a finding of its own
        return None
    with torch.device("meta"), default_dtype(torch_dtype(config.training.dtype)):
        return 3 * sum(parameter.nbytes for parameter in family.build(args).parameters())
