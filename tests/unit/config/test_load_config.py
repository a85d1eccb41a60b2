"""Defaults < TOML < command line, typed, validated once, all problems at once."""

import math
import os
from pathlib import Path

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.config.fields import known_keys
from torchtitan.config.load import load_config, load_toml
from torchtitan.config.schema import JobConfig
from torchtitan.config.shipped import CLONE, shipped_configs
from torchtitan.config.show import show_config
from torchtitan.config.toml_text import config_toml_text, dump_toml

RICH = [
    "--training.max_norm=inf",
    "--training.dataset_path=a 'quoted' \"path\" \\ with ünïcode",
    "--optimizer.eps=1e-9",
    "--optimizer.lr=0.1",
    "--data.lanes=4",
    "--debug.seed=9223372036854775807",
    "--job.custom_import=os,json",
    "--job.description=two\nlines\tand # no comment",
    "--model.args.n_layers=3",
    "--model.args.rope_theta=1e5",
    "--model.args.names=['a', 'b']",
    "--model.args.deep.er=true",
    "--handlers.compile.backend=aot_eager",
    "--optimizer.param_groups=[{pattern = '*a', lr_factor = 2}, {pattern = 'x', weight_decay = 1}]",
]


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_defaults_file_command_line_in_that_order(toml):
    file = toml("[training]\nsteps = 5\nseq_len = 64\n[training.dataloader]\nnum_workers = 2\n")
    loaded = load_config([file, "--training.steps", "7"])
    assert loaded.config.training.steps == 7
    assert loaded.config.training.seq_len == 64
    assert loaded.config.training.dataloader.num_workers == 2
    assert loaded.config.training.local_batch_size == 8
    assert loaded.origins["training.steps"] == "command line"
    assert loaded.origins["training.seq_len"] == file
    assert loaded.origins["training.dataloader.num_workers"] == file
    assert loaded.origins["training.local_batch_size"] == "default"


def test_every_key_has_an_origin():
    loaded = load_config(["--model.args.n_layers", "2"])
    tables = {name for name, key in known_keys().items() if key.kind == "table"}
    assert set(loaded.origins) == (set(known_keys()) - tables) | {"model.args.n_layers"}
    assert loaded.origins["model.args.n_layers"] == "command line"


def test_positional_file_is_job_config_file(toml):
    file = toml("[training]\nsteps = 5\n")
    assert load_config([file]).config == load_config(["--job.config_file", file]).config


def test_config_file_named_in_the_file_is_not_followed(toml):
    file = toml('[job]\nconfig_file = "elsewhere.toml"\n')
    assert load_config([file]).config.job.config_file == file


def test_wrong_value_in_the_file_may_be_replaced(toml):
    file = toml('[training]\nsteps = "5"\n')
    with pytest.raises(ConfigError, match=r"training\.steps"):
        load_config([file])
    assert load_config([file, "--training.steps", "7"]).config.training.steps == 7


def test_problems_of_file_and_command_line_come_together(toml):
    file = toml("[training]\nsteps = 0\nlr = 1.0\n[trainign]\n")
    with pytest.raises(ConfigError) as caught:
        load_config([file, "--debug.seed", "x", "--bogus.key", "1", "--training.seq_len"])
    keys = [problem.key for problem in caught.value.problems]
    in_file = ["training.steps", "training.lr", "trainign"]
    in_flags = ["debug.seed", "--bogus.key", "--training.seq_len"]
    assert sorted(keys) == sorted(in_file + in_flags)


def test_problems_of_the_command_line_are_told_without_a_file():
    with pytest.raises(ConfigError) as caught:
        load_config(["no_such.toml", "--debug.seed", "x"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("arguments", [[], *[[flag] for flag in RICH], RICH])
def test_resolved_config_reloads_to_itself(arguments, tmp_path):
    config = load_config(arguments).config
    path = tmp_path / "config.toml"
    path.write_text(config_toml_text(config), encoding="utf-8")
    assert load_toml(path) == config
    assert load_config([str(path)]).config == config.model_copy(
        update={"job": config.job.model_copy(update={"config_file": str(path)})}
    )


@pytest.mark.parametrize("arguments", [[], RICH])
def test_shown_config_reloads_to_itself_and_names_origins(arguments, tmp_path):
    loaded = load_config(arguments)
    path = tmp_path / "shown.toml"
    path.write_text(show_config(loaded), encoding="utf-8")
    assert load_toml(path) == loaded.config
    lines = path.read_text(encoding="utf-8").splitlines()
    steps = next(line for line in lines if line.startswith("steps = "))
    assert steps.split() == ["steps", "=", "10000", "#", "default"]
    if arguments:
        layers = next(line for line in lines if line.startswith("n_layers"))
        assert layers.endswith("# command line")


def test_unset_can_be_left_out_of_toml():
    """TOML has no null, so a key whose default is not None must never be None."""
    optional = [key for key in known_keys().values() if key.optional]
    assert optional
    assert [key.name for key in optional if key.default is not None] == []


def test_dump_holds_every_set_key():
    text = dump_toml(JobConfig())
    for name, key in known_keys().items():
        if key.default is not None and key.kind != "table":
            assert f"{key.last_name} = " in text, name


def test_infinite_norm_is_the_only_infinite_number(toml):
    assert math.isinf(load_config([toml("[training]\nmax_norm = inf\n")]).config.training.max_norm)
    numbers = [key for key in known_keys().values() if key.kind in ("int", "float")]
    for key in numbers:
        for value in ("nan", "inf", "-inf"):
            if (key.name, value) == ("training.max_norm", "inf"):
                continue
            with pytest.raises(ConfigError, match=key.name):
                load_config([toml(f"[{key.section}]\n{key.last_name} = {value}\n")])


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        JobConfig().training.steps = 3  # type: ignore[misc]


def test_a_shipped_config_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shipped = shipped_configs()["llama3_8b"]
    assert load_config(["llama3_8b"]).config == load_config([str(shipped)]).config
    Path("llama3_8b").write_text("[training]\nsteps = 3\n")
    assert load_config(["llama3_8b"]).config.training.steps == 3, "a file comes first"
    assert load_config(["llama3_8b"]).config.job.config_file == "llama3_8b"


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        ("llama3_8", "did you mean `llama3_8b`, which comes with the library?"),
        ("llama3_8b.toml", "did you mean `llama3_8b`, which comes with the library?"),
        ("train_configs/llama3_8b.toml", f"did you mean {CLONE}/train_configs/llama3_8b.toml?"),
        ("old/train_configs/llama3_8b.toml", "did you mean `llama3_8b`, which comes with"),
        ("mine.toml", "check the path; the current folder is "),
    ],
)
def test_a_config_that_is_not_there(written: str, fix: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config([written])
    assert f"{tmp_path / written}: does not exist. Fix: {fix}" in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert load_config([str(path)]).config.training.steps == 3
    path.write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = x\r\n")
    with pytest.raises(ConfigError, match=r"run\.toml:2:9"):
        load_config([str(path)])


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path):
    path = tmp_path / "run.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(ConfigError, match="is a folder" if kind == "folder" else "a regular file"):
        load_config([str(path)])
