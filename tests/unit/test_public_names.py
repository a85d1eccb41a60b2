"""The public API's configs, page and help: what needs no run of its own."""

import pydoc
import re
from pathlib import Path
from typing import Any

import pytest

import torchtitan
from torchtitan.config.load import load_over


def test_settings_come_over_a_file_a_name_or_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = torchtitan.load_config
    (tmp_path / "my.toml").write_text(
        "[training]\nsteps = 7\nbatch_size = 3\n[model]\nargs.dim = 64\n"
    )
    config = load(tmp_path / "my.toml", {"training": {"seq_len": 9}, "model.args": {"n_layers": 2}})
    assert (config.training.steps, config.training.seq_len) == (7, 9)
    assert config.training.local_batch_size == 3
    assert "notice: " in capsys.readouterr().err  # of the older key
    assert config.model.args == {"dim": 64, "n_layers": 2}
    more = load(config, ["--training.steps", "8", "--job.dump-folder", "out"])
    assert (more.training.steps, more.training.seq_len) == (8, 9)
    assert more.job.config_file == str(tmp_path / "my.toml")
    assert "warmup_steps" not in more.lr_scheduler.model_fields_set  # a default may still be fitted
    assert load_over(config, {"training.steps": 9}).origins["training.steps"] == "Python"
    assert load("debug_model").model.flavor == "debugmodel"
    assert load(None, {"job.dump_folder": tmp_path}).job.dump_folder == str(tmp_path)


def test_settings_that_are_wrong_are_all_named() -> None:
    wrong = {
        "training.stepz": 3,
        "training": {"seq_len": "long"},
        "optimzer": {"lr": 1},
        "job.config_file": "other.toml",
    }
    with pytest.raises(torchtitan.ConfigError) as raised:
        torchtitan.load_config(None, wrong)
    keys = {issue.key: str(issue) for issue in raised.value.problems}
    assert set(keys) == {"training.stepz", "training.seq_len", "optimzer", "job.config_file"}
    assert "training.steps" in keys["training.stepz"] and "optimizer" in keys["optimzer"]


def test_arguments_of_the_wrong_type_say_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"load_config\(None, \{\.\.\.\}\)"):
        torchtitan.load_config({"training.steps": 3})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="as load_config returns it"):
        torchtitan.train("debug_model")  # type: ignore[arg-type]


def test_a_config_is_checked_again_before_it_trains(tmp_path: Path) -> None:
    config = torchtitan.load_config("debug_model", {"job.dump_folder": tmp_path / "run"})
    training = config.training.model_copy(update={"steps": "many"})
    with pytest.raises(torchtitan.ConfigError, match=r"training\.steps"):
        torchtitan.train(config.model_copy(update={"training": training}))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(torchtitan.__file__).parents[1] / "docs" / "guides" / "python.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)  # noqa: S102
    assert names["run"].status["step"] == 30 and len(names["two"]) == 2


def test_help_shows_the_public_names() -> None:
    text = pydoc.plain(pydoc.render_doc(torchtitan))
    for name in torchtitan.__all__:
        assert f"\n    {name}(" in text or f"class {name}(" in text, name
        assert getattr(torchtitan, name).__doc__
    assert set(torchtitan.__all__) <= set(dir(torchtitan))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = torchtitan.trian
    assert (Path(torchtitan.__file__).parent / "py.typed").exists()
