"""Figures for people: plain lines, and on a real (pseudo) terminal a bar below them."""

import os
import pty
import re
import sys
from pathlib import Path

import pytest

from tests.forked import CONTEXT, execute, serve
from torchtitan.metrics.console import format_line, format_measures

RECORD = {
    "step": 30,
    "loss": 2.34567,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "memory_peak_gib": 12.345,
    "memory_peak_fraction": 0.25,
    "tokens_per_second": 12345.6,
    "mfu": None,
}

RUN = """
import logging, sys
from pathlib import Path
import torch
from torchtitan.metrics.logger import MeasuredRun, MetricsLogger
from torchtitan.config.schema import Metrics
from torchtitan.utils.logging import init_logging

init_logging(int(sys.argv[2]), log_ranks=[0, 1])
metrics = MetricsLogger(
    Metrics(log_freq=2, disable_color_printing=sys.argv[3] == "plain"),
    MeasuredRun(Path(sys.argv[1]), int(sys.argv[2]), 2, torch.device("cpu"), 4, 1, 1),
)
metrics.resume(0)
for step in range(1, 5):
    metrics.start_step()
    metrics.log_step(step, loss=1.0, grad_norm=1.0, lr=0.1, num_targets=1, num_tokens=1)
    if step == 2:
        metrics.log_validation(step, "web", 1.0, 1)
    logging.getLogger("torchtitan").info("between")
    print("to stdout")
metrics.close()
print("the last word")
"""


def run_on_terminal(folder: Path, rank: int, style: str) -> str:
    """What the terminal got, escape sequences included."""
    here, there = pty.openpty()
    words = ["-c", RUN, str(folder), str(rank), style]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = CONTEXT.Process(target=serve, args=(words, environment, "", [os.ttyname(there)] * 2))
    process.start()
    output = os.read(here, 65536)  # the process has opened it
    os.close(there)
    try:
        while chunk := os.read(here, 65536):
            output += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(here)
    process.join(60)
    assert process.exitcode == 0, output.decode()
    return output.decode()


def test_line() -> None:
    line = format_line(RECORD, 4000)
    assert line == (
        "step:   30/4000  loss:   2.3457  grad_norm:   0.5000  lr: 3.00e-04  "
        "memory: 12.35GiB(25.0%)  tps: 12,346"
    )
    line = format_line({**RECORD, "mfu": 0.4211}, 60, eta="3m12s")
    assert line.startswith("step: 30/60  ")
    assert line.endswith("tps: 12,346  mfu: 42.11%  eta 3m12s")


def test_coloured_line_is_the_same_line() -> None:
    colored = format_line({**RECORD, "mfu": 0.5}, 60, True, eta="9s")
    assert colored.count("\x1b[0m") == 8
    plain = "".join(piece.split("m", 1)[-1] for piece in colored.split("\x1b["))
    assert plain == format_line({**RECORD, "mfu": 0.5}, 60, eta="9s")


def test_coloured_line_of_a_validation() -> None:
    record = {
        "step": 30,
        "validation/web/loss": 3.25,
        "validation/web/perplexity": 1e7,
        "validation/web/num_targets": 5,
    }
    plain = "step:   30/4000  validation/web/loss: 3.2500  validation/web/perplexity: 1e+07"
    assert format_measures(record, 4000) == plain
    colored = format_measures(record, 4000, color=True)
    assert colored.count("\x1b[0m") == 3
    assert "".join(piece.split("m", 1)[-1] for piece in colored.split("\x1b[")) == plain


def test_all_metrics_of_a_task_are_shown() -> None:
    record = {"step": 30, "evaluation/gsm8k/match/strict": 0.5, "evaluation/gsm8k/loose/strict": 1}
    tasks = "evaluation/gsm8k/match/strict: 0.5000  evaluation/gsm8k/loose/strict: 1.0000"
    assert format_measures(record, 60) == f"step: 30/60  {tasks}"
    assert format_measures(record, 60, color=True).count("\x1b[32mevaluation") == 2


def test_terminal_gets_a_bar_below_whole_lines(tmp_path: Path) -> None:
    output = run_on_terminal(tmp_path, 0, "fancy")
    assert "━" in output and "4/4" in output and "loss 1.0000" in output
    assert output.count("between") == 4 and output.count("tps: ") == 3
    assert output.count("validation/web/loss: 1.0000") == 1
    # Other output replaces the bar's line, below which the bar is drawn again.
    assert len(re.findall("(?:\n|\x1b\\[2K)to stdout", output)) == 4
    assert "\x1b[?25h" in output  # the cursor is visible again
    assert output.rstrip().endswith("the last word")


@pytest.mark.parametrize(("rank", "style"), [(0, "plain"), (1, "fancy")])
def test_no_bar_if_unwanted_or_on_other_ranks(tmp_path: Path, rank: int, style: str) -> None:
    output = run_on_terminal(tmp_path, rank, style)
    assert "━" not in output and output.count("tps: ") == 3
    assert ("\x1b[" in output) == (style == "fancy")


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", RUN, str(tmp_path), "0", "fancy"]
    done = execute(argv, os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 4 * "to stdout\n" + "the last word\n"
    assert "\x1b" not in done.stderr and "━" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 9 and "Trained 4 steps in " in lines[-1]
