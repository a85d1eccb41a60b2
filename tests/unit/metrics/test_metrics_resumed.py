"""The file of records after a resume: one curve, and nothing lost that somebody may miss."""

import json
from pathlib import Path

import pytest
from tensorboard.summary.writer import event_file_writer
from test_metrics import Clock, build, records, scalars, train

from torchtitan.metrics.sinks import JsonLinesSink


@pytest.mark.fault("F51")
@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', "", "\n", '{"step": null}\n'])
def test_resume_leaves_one_curve(
    tmp_path: Path, torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second are told apart, and ordered, by a count, as text: 9 comes after 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    clock = Clock()
    metrics = build(tmp_path, clock, enable_tensorboard=True, steps=12)
    metrics.resume(0)
    train(metrics, clock, 1, 9)
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)  # the process died while it wrote

    metrics = build(tmp_path, clock, enable_tensorboard=True, steps=12)
    metrics.resume(5, num_tokens_seen=500)
    assert [record["step"] for record in records(tmp_path)] == [1, 3]
    train(metrics, clock, 6, 12)
    metrics.close()

    written = records(tmp_path)
    assert [record["step"] for record in written] == [1, 3, 6, 9, 12]
    assert [record["num_tokens_seen"] for record in written] == [100, 300, 600, 900, 1200]
    # Two files of events, and TensorBoard shows one curve of them.
    assert len(list((tmp_path / "tb" / tmp_path.name).iterdir())) == 2
    curve = scalars(tmp_path / "tb", "ntokens_seen")
    assert curve == [(1, 100), (3, 300), (6, 600), (9, 900), (12, 1200)]


def test_resume_needs_no_space_unless_the_file_is_damaged(tmp_path: Path) -> None:
    """Else a full disk would keep the steps that are trained anew, and have them twice."""
    path = tmp_path / "metrics.jsonl"
    for damage, stays in (("", True), ("half a line\n", False)):
        path.write_text(f'{{"step": 1}}\n{damage}{{"step": 2}}\n{{"step": 3}}\n')
        inode = path.stat().st_ino
        sink = JsonLinesSink(path)
        sink.resume(2)
        sink.write({"step": 3, "loss": 0.5})
        sink.close()
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
        assert (path.stat().st_ino == inode) == stays


@pytest.mark.parametrize("damaged", [b"\0" * 40 + b"\n", b'{"step": 2, "lo\n', b"[1]\n\xff\xfe\n"])
def test_damaged_lines_are_told_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    """Also behind the last step that is kept; but for a line that a kill has cut off."""
    path = tmp_path / "metrics.jsonl"
    for number, last in enumerate((b'{"step": 3}\n', b""), 1):
        before = b'{"step": 1}\n' + damaged + last + b'{"step'
        path.write_bytes(before)
        sink = JsonLinesSink(path)
        sink.resume(3)
        sink.close()
        assert path.read_bytes() == b'{"step": 1}\n' + last
        assert (tmp_path / f"metrics.jsonl.damaged-{number}").read_bytes() == before
        text = "line 2, 3 cannot" if damaged.count(b"\n") == 2 else "line 2 cannot"
        assert text in caplog.messages[-1] and f"damaged-{number}" in caplog.messages[-1]


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    clock = Clock()
    train(build(tmp_path, clock), clock, 1, 3)
    metrics = build(tmp_path, clock)
    metrics.resume(0)
    assert records(tmp_path) == []
