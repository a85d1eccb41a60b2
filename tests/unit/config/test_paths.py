"""Paths in a config: every one of them may hold `~` and variables."""

from pathlib import Path

import pytest

from torchtitan.cli import main
from torchtitan.config.fields import Key, keys_of, known_keys, paths_of
from torchtitan.config.load import load_config
from torchtitan.config.paths import hub_hint
from torchtitan.config.run_context import RunContext
from torchtitan.config.shipped import CLONE, found_elsewhere
from torchtitan.preflight import FILES, preflight
from torchtitan.preflight.mesh import check_static

TABLES = [key for key in known_keys().values() if key.item is not None]
NAMED_OTHERWISE = (
    *("job.config_file", "job.dump_folder", "evaluation.task_dir"),
    *("data.chat_template", "debug.record_tensors", "checkpoint.remote_folder"),
)


def is_called_a_path(key: Key) -> bool:
    return key.kind == "str" and (
        key.last_name.endswith(("path", "_csv")) or key.name in NAMED_OTHERWISE
    )


def test_every_key_that_names_a_file_is_a_path():
    keys = [*known_keys().values(), *(key for table in TABLES for key in keys_of(table.item))]
    assert {key.name for key in keys if is_called_a_path(key)} == {
        key.name for key in keys if key.is_path
    }
    assert "path" in {key.name for key in keys if key.is_path}, "that of [[data.sources]]"


@pytest.mark.parametrize(
    "written", ["~/x.toml", "$FOLDER/x.toml", "${FOLDER}/x.toml", "$HERE/x.toml"]
)
def test_every_path_is_expanded(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"HOME": tmp_path, "FOLDER": tmp_path, "HERE": "~"}.items():
        monkeypatch.setenv(name, str(value))
    file = tmp_path / "x.toml"
    scalars = [key.name for key in known_keys().values() if key.is_path]
    lines = [f'{name} = "{written}"' for name in scalars if name != "job.config_file"]
    lines += [
        f'data.sources = [{{weight = 1, path = "{written}"}}]',
        f'validation.sets = [{{name = "a", dataset_path = "{written}"}}]',
    ]
    file.write_text("\n".join(lines))
    config = load_config([written]).config
    found = dict(paths_of(config))
    assert found == {name: str(file) for name in found}
    assert set(found) == {*scalars, "data.sources[0].path", "validation.sets[0].dataset_path"}


def test_the_place_where_an_absent_path_may_be_meant_to_start(tmp_path: Path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    beside = str(tmp_path / "configs" / "run.toml")
    for name in ("a.jsonl", "*.jsonl"):
        assert found_elsewhere(name, beside) == tmp_path / "configs" / name
    assert found_elsewhere("torchtitan/data") == CLONE / "torchtitan" / "data"
    assert found_elsewhere("configs/a.jsonl", beside) is None, "it is not absent"
    assert found_elsewhere("b.jsonl", beside) is None
    flags = ["--training.dataset_path", "torchtitan/data"]
    problems = preflight(RunContext(load_config(flags).config, 1, "cpu"), [FILES])
    assert [f"did you mean {CLONE}/torchtitan/data?" in str(problem) for problem in problems] == [
        True
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("$NO_SUCH/run", "the environment has no variable NO_SUCH"),
        ("a/${NO_SUCH}", "the environment has no variable NO_SUCH"),
        ("~no_such_user/run", "there is no home folder of no_such_user"),
    ],
)
def test_a_variable_that_is_not_set_is_no_folder(written: str, expected: str):
    config = load_config(["--job.dump_folder", written]).config
    (problem,) = check_static(RunContext(config, 1, "cpu"))
    assert str(problem).startswith(f'job.dump_folder = "{written}": {expected}. Fix: ')
    assert problem.missing_asset, "elsewhere it may be set"


def test_a_home_folder_that_is_nobodys_is_a_message(tmp_path: Path, monkeypatch, capfd):
    """In every path: none of their readers expands it again, which pathlib does with an error."""
    monkeypatch.chdir(tmp_path)
    for key in ("job.dump_folder", "model.tokenizer_path", "checkpoint.initial_load_path"):
        flags = [
            f"--{key}",
            "~no_such_user/x",
            "--checkpoint.enable",
            "--training.dataset=stdlib",
            "--check",
        ]
        assert main(["train", *flags]) == 9
        assert f'{key} = "~no_such_user/x": there is no home' in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_config_show_warns_of_a_variable_that_is_not_set(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "show", "--job.dump_folder=$NO_SUCH/run"]) == 0
    shown = capsys.readouterr()
    assert "the environment has no variable NO_SUCH" in shown.err and "warning: " in shown.err
    assert '"$NO_SUCH/run"' in shown.out


@pytest.mark.parametrize(
    ("given", "is_meant"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("there/step-5", False),
        ("/a/b", False),
        ("./a", False),
        ("a/b/c", False),
        ("a", False),
    ],
)
def test_a_path_that_looks_like_a_model_of_the_hub(
    given: str, is_meant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert (f"did you mean hf://{given}?" in hub_hint(given)) == is_meant
