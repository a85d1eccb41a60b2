"""The doctor measures, and advises by what it has measured."""

from pathlib import Path

import pytest

from torchtitan.cli import main
from torchtitan.commands.doctor import speed
from torchtitan.commands.doctor.speed import (
    allocator_finding,
    busy_finding,
    format_finding,
    gain,
    in_turns,
    save_finding,
    threads_finding,
)
from torchtitan.config.schema import Checkpoint

MIB = 2**20


def test_a_gain_is_one_in_three_rounds_of_four() -> None:
    assert gain([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 4.0]) == (2.0, True)
    assert gain([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 4.0, 4.0])[1] is False
    assert gain([1.05] * 5, [1.0] * 5) == (1.05, False), "within noise"
    assert gain([1.0, 9.0, 1.0], [1.0, 1.0, 1.0])[1] is False, "one slow round is no gain"


@pytest.mark.parametrize(
    ("in_use", "bfloat16", "line"),
    [
        (
            "bfloat16",
            2.0,
            "look   speed of number formats: 50 and 100 tokens/s of a small Llama in bfloat16 and"
            " float32: float32 is 2.0 times as fast. Fix: set"
            ' training.mixed_precision_param = "float32"',
        ),
        (
            "float32",
            0.5,
            "look   speed of number formats: 200 and 100 tokens/s of a small Llama in bfloat16 and"
            " float32: bfloat16 is 2.0 times as fast. Fix: set"
            ' training.mixed_precision_param = "bfloat16", which rounds more',
        ),
        (
            "bfloat16",
            0.5,
            "ok     speed of number formats: 200 and 100 tokens/s of a small Llama in bfloat16 and"
            " float32; nothing to gain",
        ),
        (
            "float64",
            0.5,
            "-      speed of number formats: 200 and 100 tokens/s of a small Llama in bfloat16 and"
            " float32",
        ),
    ],
)
def test_the_faster_number_format_is_advised(in_use: str, bfloat16: float, line: str) -> None:
    seconds = {"bfloat16": [bfloat16] * 4, "float32": [1.0] * 4}
    assert format_finding(in_use, seconds, 100).line() == line


def test_rounds_that_contradict_each_other_advise_nothing() -> None:
    rounds = [1.0, 1.0, 9.0, 9.0]
    found = format_finding("float32", {"bfloat16": rounds, "float32": [4.0] * 4}, 100)
    assert found.line().startswith("-  ") and found.text.endswith(
        "too noisy to advise, measure again"
    )
    assert threads_finding(2, {1: [1.0, 1.0, 1.0, 9.0, 9.0], 2: [4.0] * 5}, busy=False).ok is None


def test_the_fastest_number_of_threads_is_advised_on_a_quiet_machine() -> None:
    seconds = {1: [4.0] * 4, 4: [1.0] * 4, 8: [2.0] * 4}
    advice = threads_finding(8, seconds, busy=False).line()
    assert advice == (
        "look   speed of threads: 4 threads: 2.0 times as fast as 8 threads."
        " Fix: set debug.threads = 4, for one process"
    )
    beside = threads_finding(8, seconds, busy=True).line()
    assert beside.startswith("-  ") and "beside the other programs" in beside
    best = threads_finding(4, seconds, busy=False).line()
    assert best == "ok     speed of threads: 4 threads: 2.0 times as fast as 8; nothing to gain"


def test_a_tuned_allocator_is_advised_where_it_helps() -> None:
    advice = allocator_finding([3.0] * 4, [1.0] * 4).line()
    assert "3.0 times as fast once glibc keeps it" in advice
    assert advice.endswith('Fix: set debug.cpu_allocator = "tuned"')
    assert allocator_finding([1.0] * 4, [1.0] * 4).ok is True, "as with a preloaded jemalloc"


def test_saves_that_take_long_are_advised_to_be_asynchronous() -> None:
    saving = Checkpoint(enable=True, interval=50)
    advice = save_finding(saving, 1000 * MIB, 100 * MIB, 2000 * MIB).line()
    assert advice == (
        "look   speed of the run folder: 100 MiB/s, synced: 10.0 s for a checkpoint of 1000 MiB,"
        " for which training waits every 50 steps; it would wait 0.5 s for a copy in memory. Fix:"
        ' set checkpoint.async_mode = "async"; it needs 1000 MiB of host memory'
    )
    short = save_finding(saving, 50 * MIB, 100 * MIB, 2000 * MIB)
    assert short.ok is True and "nothing to gain" in short.text
    fast_disk = save_finding(saving, 10_000 * MIB, 2000 * MIB, 2000 * MIB)
    assert fast_disk.ok is True, "a copy takes as long"
    already = saving.model_copy(update={"async_mode": "async"})
    assert save_finding(already, 1000 * MIB, 100 * MIB, 2000 * MIB).ok is True
    for section, size in ((Checkpoint(), 1000 * MIB), (saving, None)):
        text = save_finding(section, size, 100 * MIB, 2000 * MIB).line()
        assert text == "-      speed of the run folder: 100 MiB/s, synced"


def test_other_programs_are_named() -> None:
    assert busy_finding(0.9, 2) is None
    finding = busy_finding(3.0, 2)
    assert finding is not None and "load 3.0 on 2 cores" in finding.text


def test_candidates_are_measured_in_turns_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_BUDGET_SECONDS", 0.0)
    order: list[str] = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"})
    assert "".join(order) == "abababab", "a warmup and three rounds"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_the_doctor_measures_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "_BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_WRITTEN_BYTES", speed._PIECE_BYTES)
    monkeypatch.setitem(speed._TOKENS, "cpu", (1, 16))
    monkeypatch.setattr(speed, "num_cores", lambda: 2)
    words = ["--training.dataset", "stdlib", "--model.flavor", "debugmodel"]
    words += ["--model.tokenizer_path", "bytes", "--checkpoint.enable", "--job.device", "cpu"]
    assert main(["doctor", *words]) == 0
    shown = capsys.readouterr()
    lines = dict(line[7:].split(": ", 1) for line in shown.out.splitlines())
    assert "tokens/s of a small Llama in bfloat16 and float32" in lines["speed of number formats"]
    assert "times as fast as" in lines["speed of threads"]
    assert " s for a checkpoint of 55.6 MiB" in lines["speed of the run folder"]
    assert "speed" not in lines and "speed of the allocator" not in lines
    assert "Measuring" in shown.err and list(tmp_path.iterdir()) == []
    main(["doctor", "--quick"])
    shown = capsys.readouterr()
    assert "speed" not in shown.out and "Measuring" not in shown.err


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    from torchtitan.config import JobConfig
    from torchtitan.config.run_context import RunContext

    def fails() -> None:
        raise RuntimeError("no such kernel")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_step", lambda kind, dtype: fails)
        found = list(speed.speed_findings(RunContext(JobConfig(), 1, "cpu"), tmp_path, False))
    assert found[-1].line() == "-      speed: not measured: no such kernel"
