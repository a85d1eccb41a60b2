"""TorchTitan's other names: told by name, never by a guess."""

import pytest

from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.fields import free_table_of, known_keys
from torchtitan.config.load import load_config
from torchtitan.config.other_names import MISSING, MISSING_SECTIONS, RENAMED, SWITCHES


def problem_of(*arguments: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    (problem,) = caught.value.problems
    return problem


def in_file(tmp_path, text: str) -> list[str]:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([str(path)])
    return [str(problem) for problem in caught.value.problems]


def test_new_names_exist_and_old_ones_do_not():
    for old, new in RENAMED.items():
        assert new in known_keys() or free_table_of(new), old
    for old, (new, _) in SWITCHES.items():
        assert new in known_keys(), old
    assert not (set(RENAMED) | set(SWITCHES) | MISSING) & set(known_keys())
    assert not set(RENAMED) & (MISSING | set(SWITCHES))


@pytest.mark.parametrize(
    "name",
    [
        "metrics.enable_wandb",
        "parallelism.expert_parallel_degree",
        "parallelism.enable_compiled_autograd",
        "checkpoint.interval_type",
        "training.enable_cpu_offload",
        "training.dataloader.persistent_workers",
        "validation.freq",
        "quantize.linear.float8.emulate",
    ],
)
def test_missing_key_is_refused_by_name(name: str, tmp_path):
    problem = problem_of(f"--{name}", "1")
    assert str(problem) == f"--{name}: is not available yet. Fix: remove it."
    section, _, key = name.rpartition(".")
    (text,) = in_file(tmp_path, f"[{section}]\n{key} = false\n")
    shown = section.split(".")[0] if section.split(".")[0] in MISSING_SECTIONS else name
    assert text == f"{shown}: is not available yet. Fix: remove it."


def test_missing_section_is_one_problem(tmp_path):
    text = '[float8]\nrecipe_name = "rowwise"\nfilter_fqns = []\n[validation]\nenable = false\n'
    assert in_file(tmp_path, text) == [
        "float8: is not available yet. Fix: remove it.",
        "validation: is not available yet. Fix: remove it.",
    ]


def test_every_known_key_of_an_unknown_section_is_told(tmp_path):
    found = in_file(tmp_path, '[compile]\nenable = false\ncomponents = []\nbackend = "eager"\n')
    assert [text.split(": ")[0] for text in found] == [
        "compile.enable",
        "compile.components",
        "compile.backend",
    ]
    assert "is not available yet" in found[1]
    assert "`handlers.compile.backend`" in found[2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("training.data_parallel_degree", "parallelism.data_parallel_shard_degree"),
        ("training.batch_size", "training.local_batch_size"),
        ("checkpoint.enable_checkpoint", "checkpoint.enable"),
        ("training.seed", "debug.seed"),
        ("optimizer.learning_rate", "optimizer.lr"),
    ],
)
def test_old_name_leads_to_the_new_one(old: str, new: str):
    assert problem_of(f"--{old}", "1").fix == f"write `--{new}`"
    assert problem_of(f"--{old.replace('_', '-')}=1").fix == f"write `--{new}`"


def test_keys_like_none_of_them_still_get_a_guess():
    assert "`--metrics.enable_tensorboard`" in problem_of("--metrics.enable_tensorbord").fix
