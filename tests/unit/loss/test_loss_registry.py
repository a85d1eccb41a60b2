"""Losses by name: who may register one, and what of `[loss]` is refused, without torch."""

import subprocess
import sys
from typing import Any

import pytest

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Section
from torchtitan.loss.registry import LOSSES, LossEntry, entry_of, register_loss
from torchtitan.preflight import ARITHMETIC, preflight
from torchtitan.preflight.optim import check_static


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOSSES, "_registered", dict(LOSSES._registered))


class Settings(Section):
    gamma: float = 2.0
    """How much."""


class Own:
    """A loss that has nothing to do with the library's."""

    Settings: Any = Settings

    def count(self, batch: object) -> None: ...

    sum = count


def problems(loss: dict[str, Any], tp: int = 1) -> list[str]:
    config = JobConfig.model_validate(
        {"loss": loss, "parallelism": {"tensor_parallel_degree": tp}, "training": {"seq_len": 32}}
    )
    return [str(problem) for problem in check_static(RunContext(config, tp, "cpu"))]


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"name": "cross_entropy"},
        {"args": {"z_loss_weight": 1e-4}},
        {"args": {"z_loss_weight": 0.0, "label_smoothing": 0.1}},
    ],
)
def test_what_fits(loss: dict[str, Any]) -> None:
    assert problems(loss) == problems(loss, tp=2) == []


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"name": "cros_entropy"}, 'loss.name = "cros_entropy": is not a loss. Fix: did you mean'),
        (
            {"args": {"z_loss_wieght": 1e-4}},
            'loss.args.z_loss_wieght: is unknown. Fix: did you mean "z_loss_weight"?',
        ),
        ({"args": {"z_loss_weight": -1.0}}, "loss.args.z_loss_weight = -1.0: must be at least 0"),
        ({"args": {"label_smoothing": 1.0}}, "loss.args.label_smoothing = 1.0: must be less than"),
        ({"args": {"label_smoothing": "0.1"}}, "write a number, for example 0.0, without quotes"),
    ],
)
def test_mistakes_are_named(loss: dict[str, Any], expected: str) -> None:
    [text] = problems(loss)
    assert expected in text


def test_a_run_is_told() -> None:
    config = JobConfig.model_validate({"loss": {"name": "nothing"}})
    assert "is not a loss" in "\n".join(
        map(str, preflight(RunContext(config, 1, "cpu"), [ARITHMETIC]))
    )


def test_a_registered_loss() -> None:
    register_loss("own")(Own)
    register_loss("own")(Own)  # a module imported twice
    assert problems({"name": "own", "args": {"gamma": 1.5}}) == []
    [text] = problems({"name": "own", "args": {"gama": 1.5}})
    assert text.startswith("loss.args.gama: is unknown") and 'did you mean "gamma"?' in text
    assert LOSSES.origin("own") == __name__


def test_a_loss_that_needs_all_logits_is_refused_where_a_rank_has_some() -> None:
    register_loss("own")(Own)
    [text] = problems({"name": "own"}, tp=2)
    assert "parallelism.tensor_parallel_degree = 2" in text and "ChunkedLoss" in text
    register_loss("cut")(type("Cut", (Own,), {"supports_vocab_parallel": True}))
    assert problems({"name": "cut"}, tp=2) == []


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (3, "neither a class nor a LossEntry"),
        (type("Half", (), {"count": Own.count}), "lacks sum"),
        (type("Odd", (Own,), {"Settings": dict}), "is not a Section"),
    ],
)
def test_what_is_no_loss(thing: Any, expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        entry_of("mine", thing)


def test_an_entry_is_taken_as_it_is() -> None:
    entry = LossEntry(Settings, lambda: Own)
    assert entry_of("mine", entry) is entry


def test_nobody_replaces_the_librarys() -> None:
    with pytest.raises(ValueError, match="registered already, by built in"):
        register_loss("cross_entropy")(Own)


def test_nothing_but_loading_imports_torch() -> None:
    code = (
        "import sys\n"
        "from torchtitan.preflight.optim import check_static\n"
        "from torchtitan.loss.registry import LOSSES\n"
        "from torchtitan.config import JobConfig\n"
        "from torchtitan.config.run_context import RunContext\n"
        "config = JobConfig.model_validate({'loss': {'args': {'z_loss_weight': 1e-4}}})\n"
        "assert check_static(RunContext(config, 1, 'cpu')) == []\n"
        "assert 'torch' not in sys.modules\n"
        "assert LOSSES['cross_entropy'].load().__name__ == 'CrossEntropyLoss'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_list_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    from torchtitan.cli import main

    register_loss("own")(Own)
    assert main(["list", "losses"]) == 0
    rows = capsys.readouterr().out.splitlines()
    rows = [row for row in rows if not row.startswith("tests.")]  # of other test files
    assert rows[0].split(None, 1) == ["cross_entropy", "settings: z_loss_weight, label_smoothing"]
    assert [row.split()[0] for row in rows] == ["cross_entropy", "dpo", "distillation", "own"]
    assert rows[3].split(None, 1) == ["own", f"settings: gamma (from {__name__})"]
