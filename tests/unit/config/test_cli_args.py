"""Every spelling of a flag that people use."""

import itertools
from pathlib import Path

import pytest

from torchtitan.config.cli_args import parse_command_line
from torchtitan.config.errors import ConfigError
from torchtitan.config.load import load_config


def values(line: str) -> dict[str, object]:
    parsed = parse_command_line(line.split())
    assert parsed.problems == []
    return parsed.values


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--training.steps 5", "training.steps", 5),
        ("--training.steps=5", "training.steps", 5),
        ("--training.seq-len 5", "training.seq_len", 5),
        ("--training.dataloader.num-workers 2", "training.dataloader.num_workers", 2),
        ("--checkpoint.load_step -1", "checkpoint.load_step", -1),
        ("--training.steps 1_000", "training.steps", 1000),
        ("--optimizer.lr 3e-4", "optimizer.lr", 3e-4),
        ("--optimizer.lr 1", "optimizer.lr", 1.0),
        ("--data.lanes None", "data.lanes", None),
        ("--job.description 5", "job.description", "5"),
        ("--job.description=a=b", "job.description", "a=b"),
        ("--job.new_run", "job.new_run", True),
        ("--job.new_run true", "job.new_run", True),
        ("--job.new_run False", "job.new_run", False),
        ("--job.new-run=false", "job.new_run", False),
        ("--no-job.new_run", "job.new_run", False),
        ("--job.no-new-run", "job.new_run", False),
        ("--job.no_new_run", "job.new_run", False),
        ("--model.handlers a b", "model.handlers", ["a", "b"]),
        ("--model.handlers a,b", "model.handlers", ["a", "b"]),
        ("--model.handlers=a,b", "model.handlers", ["a", "b"]),
        ("--model.handlers a, b", "model.handlers", ["a", "b"]),
        ("--model.handlers ['a','b']", "model.handlers", ["a", "b"]),
        ("--model.handlers []", "model.handlers", []),
        (
            "--parallelism.module_fqns_per_model_part [['a','b'],['c']]",
            "parallelism.module_fqns_per_model_part",
            [["a", "b"], ["c"]],
        ),
        ("--model.args.n_layers 4", "model.args.n_layers", 4),
        ("--model.args.n-layers=4", "model.args.n_layers", 4),
        ("--loss.args.token_weight 0.5", "loss.args.token_weight", 0.5),
        ("--loss.args.auth_key false", "loss.args.auth_key", False),
        ("--model.args.tied true", "model.args.tied", True),
        ("--model.args.theta 5e5", "model.args.theta", 5e5),
        ("--model.args.dims [1,2]", "model.args.dims", [1, 2]),
        ("--model.args {n_layers=4}", "model.args.n_layers", 4),
        ('--handlers.freeze.only ["output.*"]', "handlers.freeze.only", ["output.*"]),
        ("--handlers.compile.backend inductor", "handlers.compile.backend", "inductor"),
        ("run.toml", "job.config_file", "run.toml"),
    ],
)
def test_spelling(line: str, name: str, value: object):
    (found,) = values(line).items()
    assert found == (name, value)
    assert type(found[1]) is type(value)


def test_switch_leaves_the_next_argument_alone():
    assert values("--job.new_run run.toml --job.print_config --training.steps 3") == {
        "job.new_run": True,
        "job.config_file": "run.toml",
        "job.print_config": True,
        "training.steps": 3,
    }


def test_list_ends_at_the_next_flag():
    found = values("--model.handlers a b --training.steps 3")
    assert found == {"model.handlers": ["a", "b"], "training.steps": 3}


def test_of_a_flag_given_twice_the_last_value_counts_with_a_notice():
    """Wrapper scripts append overrides."""
    parsed = parse_command_line(
        ["--training.steps", "3", "--debug.seed", "1", "--training.steps=5"]
    )
    assert (parsed.problems, parsed.values) == ([], {"training.steps": 5, "debug.seed": 1})
    (notice,) = parsed.notices
    assert notice == "--training.steps is given twice (3 and 5): the last one counts"
    assert load_config(["--model.args.dim=8", "--model.args", "{dim=64}"]).notices != ()


def test_same_value_twice_needs_no_notice():
    parsed = parse_command_line(["--training.steps", "3", "--training.steps=3"])
    assert (parsed.values, parsed.notices) == ({"training.steps": 3}, [])


TABLES = ["--model.args.n_layers=4", "--model.args={dim=64}", "--model.args={n_heads=2}"]


@pytest.mark.parametrize("flags", list(itertools.permutations([*TABLES, "--model.args={}"])))
def test_tables_and_keys_of_a_table_add_up_in_any_order(flags: tuple[str, ...], tmp_path: Path):
    (tmp_path / "run.toml").write_text("[model.args]\nn_layers = 1\nrope_theta = 5.0\n")
    args = load_config([str(tmp_path / "run.toml"), *flags]).config.model.args
    assert args == {"n_layers": 4, "rope_theta": 5.0, "dim": 64, "n_heads": 2}


def test_unknown_flag_takes_its_value_with_it():
    parsed = parse_command_line(["--training.stepz", "3", "--debug.seed", "1"])
    assert [problem.key for problem in parsed.problems] == ["--training.stepz"]
    assert parsed.values == {"debug.seed": 1}


@pytest.mark.parametrize("word", ["maybe", "yes", "0"])
def test_switch_with_something_else_is_refused(word: str):
    with pytest.raises(ConfigError, match=r"job\.new_run.*true or false"):
        load_config([f"--job.new_run={word}"])


def test_a_list_whose_quotes_the_shell_took_is_told_how_to_be_written():
    parsed = parse_command_line(["--handlers.freeze.only", "[output.*]", "--debug.seed", "1"])
    (problem,) = parsed.problems
    assert str(problem) == (
        """--handlers.freeze.only = "[output.*]": is not TOML. Fix: write it as in TOML and quote"""
        """ it for the shell: `--handlers.freeze.only '["a", "b"]'`."""
    )
    assert parsed.values == {"debug.seed": 1}


def test_yes_after_a_switch_is_not_taken_for_a_file():
    with pytest.raises(ConfigError, match=r'job\.new_run = "yes"'):
        load_config(["--job.new_run", "yes"])
