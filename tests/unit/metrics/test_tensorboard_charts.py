"""TensorBoard shows more than scalars: the run's name, charts, its config and a data sample."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.summary.writer import event_file_writer
from test_metrics import Clock, build, scalars, train

from torchtitan.metrics.sinks import TENSORBOARD_TAGS
from torchtitan.metrics.tensorboard import CHARTS, as_code, layout_of


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def tensor(events: EventAccumulator, tag: str) -> bytes:
    [event] = events.Tensors(tag)
    [text] = event.tensor_proto.string_val
    return text


def start(run: Path, first: int = 1, last: int = 3, **settings: Any) -> None:
    metrics = build(run, clock := Clock(), enable_tensorboard=True, steps=12, **settings)
    metrics.resume(first - 1)
    train(metrics, clock, first, last)
    metrics.close()


def test_a_run_has_the_name_of_its_folder(tmp_path: Path) -> None:
    start(tmp_path)
    assert [child.name for child in (tmp_path / "tb").iterdir()] == [tmp_path.name]


@pytest.mark.parametrize("then", ["tb", "tb/former_name", "tb/rank_0"])
def test_a_resumed_run_stays_one_run_where_it_was(
    tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that has been renamed, and where older releases wrote."""
    # Files of one second are told apart, and ordered, by a count, as text: 9 comes after 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    every = {"save_for_all_ranks": then.endswith("rank_0")}
    start(tmp_path, **every)
    own = next((tmp_path / "tb").rglob("*.tfevents.*")).parent
    shutil.move(own, tmp_path / "moved")
    shutil.rmtree(tmp_path / "tb")
    (tmp_path / then).parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "moved", tmp_path / then)
    start(tmp_path, 4, 6, **every)
    assert [step for step, _ in scalars(tmp_path / "tb", "loss")] == [1, 3, 6]


def test_a_run_called_like_a_rank_stays_where_it_was(tmp_path: Path) -> None:
    run = tmp_path / "rank_0"
    run.mkdir()
    start(run)
    start(run, 4, 6)
    assert [child.name for child in (run / "tb").iterdir()] == ["rank_0"]


def test_a_renamed_run_that_had_saved_nothing_has_one_curve(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "tb" / tmp_path.name).rename(tmp_path / "tb" / "former_name")
    start(tmp_path)
    assert [child.name for child in (tmp_path / "tb").iterdir()] == ["former_name"]


def test_charts_begin_with_the_loss_and_have_values(tmp_path: Path) -> None:
    start(tmp_path)
    start(tmp_path, 4, 6)
    events = events_of(tmp_path / "tb" / tmp_path.name)
    layout = Layout.FromString(
        events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    )
    assert [category.title for category in layout.category] == [
        *("Loss", "Optimizer", "Speed, per device", "Memory", "Time")
    ]
    for category in layout.category:
        for chart in category.chart:
            assert any(
                re.match(pattern, tag)
                for pattern in chart.multiline.tag
                for tag in events.Tags()["scalars"]
            ), chart.title
    assert "model FLOPs utilisation (%)" not in str(layout), "there is none on a CPU"


def test_losses_of_training_and_validation_share_a_chart() -> None:
    [pattern, of_validation] = CHARTS["Loss"]["training and validation"]
    assert re.match(pattern, "loss") and not re.match(pattern, "loss/cross_entropy")
    for tag in ("validation/loss", "validation/web/loss"):
        assert re.match(of_validation, tag)
    assert layout_of(["mfu(%)"]) == {
        "Speed, per device": {
            "model FLOPs utilisation (%)": ["Multiline", [r"mfu(_causal)?\(%\)$"]]
        }
    }


def test_no_tag_repeats_a_word_of_its_group() -> None:
    for tag in TENSORBOARD_TAGS.values():
        group, _, name = tag.partition("/")
        assert not set(group.split("_")) & set(re.findall("[a-z]+", name)), tag


def test_texts_are_shown_once_and_by_rank_0_alone(tmp_path: Path) -> None:
    asked = []

    def texts() -> dict[str, str]:
        asked.append(1)
        return {"config": as_code("a = 1\n\n# b")}

    for rank in (0, 1):
        start(tmp_path, rank=rank, texts=texts, save_for_all_ranks=True)
    assert len(asked) == 1
    events = events_of(tmp_path / "tb" / tmp_path.name / "rank_0")
    assert tensor(events, "config/text_summary") == b"    a = 1\n    \n    # b"
