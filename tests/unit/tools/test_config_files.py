"""`torchtitan config copy | convert` and `torchtitan list configs`."""

from pathlib import Path

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.config.fields import known_keys
from torchtitan.config.load import load_config
from torchtitan.tools import config_files, config_words, list_words


def problem_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config_words.run(list(arguments))
    return str(caught.value)


def test_a_copy_is_the_shipped_file(tmp_path: Path, capsys):
    path = tmp_path / "mine.toml"
    assert config_words.run(["copy", "llama3_8b", str(path)]) == 0
    assert path.read_bytes() == config_files.shipped_configs()["llama3_8b"].read_bytes()
    assert f"CONFIG_FILE={path} ./run_llama_train.sh" in capsys.readouterr().out


def test_a_copy_in_a_folder_keeps_the_name(tmp_path: Path):
    config_words.run(["copy", "debug_model.toml", str(tmp_path)])
    assert load_config([str(tmp_path / "debug_model.toml")]).config.training.steps == 200


def test_nothing_is_overwritten(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text("[training]\nbatch_size = 3\n")
    assert "exists already" in problem_of("copy", "llama3_8b", str(path))
    assert "exists already" in problem_of("convert", str(path), str(path))
    assert path.read_text() == "[training]\nbatch_size = 3\n"


def test_what_cannot_be_written_is_told(tmp_path: Path):
    path = str(tmp_path / "no" / "mine.toml")
    assert "cannot be written: No such file" in problem_of("copy", "llama3_8b", path)


def test_a_wrong_name_is_told():
    assert 'did you mean "llama3_70b"?' in problem_of("copy", "lama3_70b", "x.toml")
    assert "write `torchtitan config copy NAME FILE`" in problem_of("copy", "llama3_8b")
    assert "write `torchtitan config convert OLD.toml [NEW.toml]`" in problem_of("convert")


def test_a_package_without_its_clone_says_so(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(config_files, "_FOLDER", tmp_path / "train_configs")
    assert "beside the package" in problem_of("copy", "llama3_8b", str(tmp_path / "x.toml"))


def test_a_conversion_holds_what_the_file_says_and_no_more(tmp_path: Path, capsys):
    old = tmp_path / "old.toml"
    old.write_text(
        "# gone\n[training]\nbatch_size = 3\ncompile = true\n[experimental]\n"
        "pipeline_parallel_degree = 2\n[fault_tolerance]\nenable = false\n"
        "[model.args]\nn_layers = 2\n"
    )
    assert config_words.run(["convert", str(old)]) == 0
    printed = capsys.readouterr()
    assert printed.out.split("\n\n", 1)[1] == (
        '[model]\nhandlers = [\n    "compile",\n]\n\n[model.args]\nn_layers = 2\n\n'
        "[training]\nlocal_batch_size = 3\n\n[parallelism]\npipeline_parallel_degree = 2\n"
    )
    assert printed.out.startswith("# old.toml with today's keys")
    assert "notice: training.batch_size is training.local_batch_size today" in printed.err


def test_what_is_refused_is_not_converted(tmp_path: Path):
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text("[fault_tolerance]\nenable = true\n")
    assert "does not have fault tolerance" in problem_of("convert", str(old), str(new))
    assert not new.exists()


def test_lists(capsys):
    for name, expected in (
        ("configs", "for 8 GPUs of 80 GB"),
        ("optimizers", "AdamW  settings: lr, beta1"),
        ("tokenizers", "bytes"),
    ):
        assert list_words.run([name]) == 0
        assert expected in capsys.readouterr().out
    list_words.run(["optimizers"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(known_keys()["optimizer.name"].choices)


def test_every_shipped_config_is_listed_with_what_it_is_for(capsys):
    list_words.run(["configs"])
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in rows] == list(config_files.shipped_configs())
    assert all(text.startswith("for ") for _, text in rows)
