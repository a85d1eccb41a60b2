"""`torchtitan plot`, on files as runs write them and as interruptions leave them."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchtitan.cli import main
from torchtitan.commands.plot import Curve, chosen_metrics, run_names
from torchtitan.commands.plot_figure import short, smoothed, thinned
from torchtitan.metrics.records import read_records

NAN = math.nan


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def record(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 10 / step,
        "grad_norm": 1.0 + step % 2,
        "lr": 1e-3,
        "num_tokens_seen": 2048 * step,
        "tokens_per_second": 1000.0,
        "mfu": None,
        "run_seconds": 2.5 * step,
        "memory_peak_gib": 0.7,
    } | values


def write(file: Path, *records: dict[str, Any], end: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(one) + "\n" for one in records) + end)
    return file


def texts(file: Path) -> list[str]:
    """The texts of an SVG, as a viewer shows them."""
    elements = ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()).strip() for element in elements]


def colors(file: Path) -> set[str]:
    return {name for name in ("0072b2", "d55e00", "56b4e9") if f"#{name}" in file.read_text()}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plot", *words]) == 2
    return capsys.readouterr().err


def test_a_run_becomes_a_png_named_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("runs/first/metrics.jsonl"), *(record(step) for step in range(1, 9)))
    for _ in range(2):  # the second replaces the first
        assert main(["plot", "runs/first"]) == 0
        assert capsys.readouterr().out == "Wrote plot_first.png: 5 charts of 1 run\n"
    assert Path("plot_first.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path().iterdir()) == ["plot_first.png", "runs"]


def test_an_svg_has_titles_units_ticks_and_the_name_of_the_run() -> None:
    steps = (record(step) for step in range(1, 9))
    validation = {"step": 8, "validation/loss": 2.0, "validation/perplexity": 7.4}
    tasks = {"step": 8, "evaluation/arc/acc": 0.5, "evaluation/arc/acc_stderr": 0.1}
    code = {"step": 8, "validation/code/loss": 3.0}
    write(Path("a/metrics.jsonl"), *steps, validation, code, tasks)
    assert main(["plot", "a", "--output", "a.svg"]) == 0
    shown = texts(Path("a.svg"))
    titles = ["Loss", "Learning rate", "Gradient norm, before clipping"]
    titles += ["Throughput, tokens/s per device", "Peak memory, GiB", "Validation loss"]
    titles += ["Validation loss of code", "evaluation/arc/acc"]
    assert [text for text in shown if text in titles] == titles
    assert {"a", "steps", "training", "validation", "8"} <= set(shown)
    assert not any("stderr" in text or "perplexity" in text for text in shown)
    assert "stroke: #ffffff" in Path("a.svg").read_text(), "the dot of the validation"


def test_runs_have_names_of_their_own_and_colours() -> None:
    for name in ("one/run", "two/run", "_$x"):
        write(Path(name) / "metrics.jsonl", *(record(step) for step in range(1, 9)))
    words = ["one/run", "--by", "tokens", "two/run/metrics.jsonl", "_$x", "one/../one/run"]
    assert main(["plot", *words, "--output", "three.svg"]) == 0
    shown = texts(Path("three.svg"))
    assert {"one/run", "two/run", "_$x", "tokens", "15K"} <= set(shown)
    assert shown.count("one/run") == 1, "one folder is one run"
    assert colors(Path("three.svg")) == {"0072b2", "d55e00"}
    assert main(["plot", "one/run", "two/run", "--dark", "--output", "dark.svg"]) == 0
    assert colors(Path("dark.svg")) == {"56b4e9"}, "the bright ones come first"
    assert main(["plot", "one/run", "two/run"]) == 0
    assert Path("plot.png").is_file()


def test_losses_may_have_a_log_scale() -> None:
    write(Path("a/metrics.jsonl"), *(record(step) for step in range(1, 9)))
    for scale, ticks in (("--log", ["10", "2", "3", "4", "6"]), ("--by=steps", list("2468"))):
        assert main(["plot", "a", "--metrics", "loss", scale, "--output", "a.svg"]) == 0
        assert " ".join(ticks) in " ".join(texts(Path("a.svg")))
        assert ("3" in texts(Path("a.svg"))) == (scale == "--log")


def test_a_run_at_work_with_gaps_and_steps_trained_twice() -> None:
    once = [record(step) for step in (1, 2, 3, 4)] + [{"step": 4, "validation/loss": 9.0}]
    again = [record(step, loss=None, lr="x") for step in (3, 4, 5)]
    file = write(
        Path("a/metrics.jsonl"), *once, *again, end='[1]\nnull\n{"step": true}\n{"step": 6'
    )
    assert [one["step"] for one in read_records(file)] == [1, 2, 3, 4, 5]
    assert read_records(file, lambda key: key == "loss")[1:3] == [
        {"step": 2, "loss": 5.0},
        {"step": 3, "loss": None},
    ]
    assert main(["plot", "a", "--output", "a.svg", "--smooth", "0.9", "--log"]) == 0
    assert "validation" not in texts(Path("a.svg")), "its step is trained again"
    assert "stroke-opacity: 0.25" in Path("a.svg").read_text(), "the measured line, faintly"


def test_one_record_is_a_dot() -> None:
    write(Path("a/metrics.jsonl"), record(1))
    assert main(["plot", "a", "--by", "time", "--output", "a.svg", "--smooth", "10"]) == 0
    assert "time of the run, seconds" in texts(Path("a.svg"))
    # matplotlib places a marker by <use>, as it does a tick.
    uses = ElementTree.parse("a.svg").iter("{http://www.w3.org/2000/svg}use")
    dots = [use for use in uses if "#0072b2" in use.get("style", "")]
    assert len(dots) == 5 + 3, "one a chart, and the mean's in the three that are smoothed"


def test_metrics_are_named_by_key_pattern_or_what_is_above() -> None:
    keys = ["loss", "loss/a", "lr", "mfu", "validation/loss", "validation/x/loss"]
    known = [key for key in keys if key != "mfu"]
    assert chosen_metrics(["loss"], keys, known) == ["loss"]
    assert chosen_metrics(["lr", "loss*"], keys, known) == ["lr", "loss", "loss/a"]
    assert chosen_metrics(["validation"], keys, known) == ["validation/loss", "validation/x/loss"]
    assert chosen_metrics(["m*", "l*r"], ["mem", *keys], ["mem", *known]) == ["mem", "lr"]
    assert chosen_metrics([], keys, known) == ["loss", "lr", "validation/loss", "validation/x/loss"]


def test_names_are_as_long_as_it_takes() -> None:
    files = ["/r/a/metrics.jsonl", "/r/b/x/metrics.jsonl", "/r/c/x/metrics.jsonl"]
    files += ["/r/a/metrics/rank_1.jsonl", "/metrics.jsonl"]
    names = run_names([Path(file) for file in files])
    assert names == ["a", "b/x", "c/x", "rank_1", "/"]


def test_smoothing_is_tensorboards_or_a_mean_and_leaves_gaps() -> None:
    steps = np.array([10.0, 20.0, 30.0, 40.0])
    curve = Curve(steps, np.array([1.0, NAN, 3.0, 5.0]), steps)
    weights = smoothed(curve, 0.5)
    expected = [1.0, NAN, (0.25 * 1 + 0.5 * 3) / 0.75, (0.125 * 1 + 0.25 * 3 + 0.5 * 5) / 0.875]
    np.testing.assert_allclose(weights, expected)
    np.testing.assert_allclose(smoothed(curve, 20), [1.0, NAN, 3.0, 4.0])
    np.testing.assert_allclose(smoothed(curve, 1), curve.y)
    np.testing.assert_allclose(smoothed(curve, 0.0), curve.y)


def test_thinning_keeps_spikes_ends_and_gaps() -> None:
    x = np.arange(100_001.0)
    y = np.sin(x / 1e4)
    y[12345], y[54321], y[70_000:80_000] = 9.0, -9.0, NAN
    few_x, few_y = thinned(x, y)
    assert len(few_x) < 4000 and (np.diff(few_x) > 0).all()
    assert few_x[0] == 0 and few_x[-1] == 100_000
    assert {9.0, -9.0} <= set(few_y)
    gap = few_y[(few_x > 70_100) & (few_x < 79_900)]
    assert len(gap) > 100 and np.isnan(gap).all()
    assert len(thinned(x[:100], y[:100])[0]) == 100


def test_ticks_are_short() -> None:
    numbers = (0, 0.0003, 25, 2500, 20_000, 1_500_000, 3e9, 2e12, -40_000)
    shown = ["0", "0.0003", "25", "2,500", "20K", "1.5M", "3B", "2T", "-40K"]
    assert [short(number) for number in numbers] == shown


def test_what_is_no_run_or_has_no_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'RUN = "nowhere": is neither a folder nor a file' in refused(capsys, "nowhere")
    Path("new").mkdir()
    told = refused(capsys, "new")
    assert "has no metrics.jsonl, so either no step is logged yet" in told
    assert "give a job.dump_folder" in told
    write(Path("runs/a/metrics.jsonl"), record(1))
    assert "Fix: name a run in it: runs/a." in refused(capsys, "runs")
    write(Path("new/metrics.jsonl"), end='{"step": 1, "lo')
    assert "has no records yet" in refused(capsys, "new")
    write(Path("new/metrics.jsonl"), {"step": 1, "loss": 1.0})
    assert "has no num_tokens_seen. Fix: align by steps" in refused(capsys, "new", "--by", "tokens")
    assert not list(Path().glob("*.png"))


def test_metrics_and_files_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a/metrics.jsonl"), record(1))
    for words, problem in (
        (["--metrics", "los"], 'is in no record. Fix: did you mean "loss"'),
        (["--metrics", "loss,mfu"], '--metrics = "mfu": is null in all records'),
        (["--output", "a.jpg"], "end it in .png, .svg or .pdf"),
        (["--output", "b/a.png"], "there is no folder b"),
        (["--output", "/proc/a.png"], '"/proc/a.png": cannot be written'),
        (["--smooth", "1.5"], "1.5 is neither a weight below 1 nor a number of steps"),
        (["--smooth", "nan"], "nan is neither"),
        (["--by", "day"], "invalid choice: 'day'"),
    ):
        assert problem in refused(capsys, "a", *words), words
    Path("d.png").mkdir()
    assert "cannot be written (a folder)" in refused(capsys, "a", "--output", "d.png")
    assert main(["plot", "a", "--metrics", "loss", "--output", "a.pdf"]) == 0
    assert Path("a.pdf").read_bytes().startswith(b"%PDF")


def test_without_matplotlib_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("a/metrics.jsonl"), record(1))
    monkeypatch.setattr("torchtitan.commands.plot.find_spec", lambda name: None)
    text = refused(capsys, "a")
    assert "needs the package matplotlib" in text and "'.[plot]'" in text


def test_names_are_shown_as_they_are_written() -> None:
    """Neither as formulas, which may be malformed, nor with letters that XML cannot hold."""
    sets = {r"validation/$\frac$/loss": 1.0}
    write(Path("a\x1b[b/metrics.jsonl"), record(1, **sets), record(2, **sets))
    assert main(["plot", "a\x1b[b", "--output", "a.svg"]) == 0
    assert {"a?[b", r"Validation loss of $\frac$"} <= set(texts(Path("a.svg")))


def test_numbers_that_no_axis_has_room_for_are_unknown() -> None:
    values = (1e308, -1e308, 10**400, 2.0)
    write(Path("a/metrics.jsonl"), *(record(i, loss=v) for i, v in enumerate(values, 1)))
    assert main(["plot", "a"]) == 0


def test_records_without_a_default_metric_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a/metrics.jsonl"), {"step": 1, "own": 2.0})
    assert "name some with --metrics" in refused(capsys, "a")
    assert main(["plot", "a", "--metrics", "own"]) == 0


def test_the_names_of_many_runs_leave_the_charts_their_room() -> None:
    heights = []
    for number in (2, 40):
        for index in range(number):
            write(Path(f"{index}/metrics.jsonl"), record(1), record(2))
        assert main(["plot", *map(str, range(number)), "--output", "a.svg"]) == 0
        chart = Path("a.svg").read_text().partition('id="patch_2"')[2]
        numbers = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", chart.partition("z")[0])]
        heights.append(max(numbers) - min(numbers))
    assert heights[1] > 0.9 * heights[0] > 50
