"""The time left: by this start's recent speed, and shown in one place."""

import logging
import re
from pathlib import Path

import pytest
import test_console
from test_metrics import Clock, build, train

from torchtitan.metrics.console import Pace
from torchtitan.utils.environment import wants_color


def test_the_time_left_follows_the_recent_steps_and_not_the_first_one() -> None:
    clock = Clock()
    pace = Pace(1000, clock)
    clock.wait(600.0)  # compiling
    pace.advance(301)
    assert pace.eta() == ""  # a resume has no speed yet
    for step in range(302, 402):
        clock.wait(2.0)
        pace.advance(step)
    assert pace.eta() == "19m58s"
    for step in range(402, 502):
        clock.wait(0.1)
        pace.advance(step)
    assert pace.eta() == "50s"


def test_nothing_is_left_at_the_end() -> None:
    pace = Pace(2, Clock())
    pace.advance(1)
    pace.advance(2)
    assert pace.eta() == ""


def test_lines_of_a_resumed_run_end_with_the_time_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="torchtitan")
    metrics = build(tmp_path, clock := Clock(), steps=60, log_freq=2)
    metrics.resume(20)
    clock.wait(50.0)
    train(metrics, clock, 21, 60)
    lines = [record.getMessage() for record in caplog.records if "console" in record.name]
    assert lines[0].startswith("step: 22/60  ") and lines[0].endswith("  eta 1m16s")
    assert "eta" not in lines[-1]


def test_a_terminal_shows_the_time_left_beside_the_bar_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = "import torchtitan.metrics.console as console\nconsole._SECONDS_BETWEEN_DRAWS = 0\n"
    monkeypatch.setattr(test_console, "RUN", always + test_console.RUN)
    output = test_console.run_on_terminal(tmp_path, 0, "fancy")
    lines = [line for line in output.splitlines() if "tps: " in line]
    assert len(lines) == 3 and not any("eta" in line for line in lines)
    assert re.search("3/4.*eta 0.0s", output) and not re.search("4/4.*eta", output)


def test_a_dumb_terminal_shows_the_time_left_in_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumb = "import os\nos.environ['TERM'] = 'dumb'\n"
    monkeypatch.setattr(test_console, "RUN", dumb + test_console.RUN)
    assert re.search("step: 2/4 .*eta 0.0s", test_console.run_on_terminal(tmp_path, 0, "fancy"))


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_who_wants_no_colour_gets_none(environ: dict[str, str], wanted: bool) -> None:
    assert wants_color(environ) is wanted


def test_a_terminal_with_no_color_gets_the_bar_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    output = test_console.run_on_terminal(tmp_path, 0, "fancy")
    assert "━" in output and not re.search("\x1b\\[[0-9;]*m", output.replace("\x1b[0m", ""))
