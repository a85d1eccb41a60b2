"""TorchTitan's keys of three releases are translated, from TOMLs and flags; typos are told."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from old_keys import COLUMNS, EVERY_KEY, problem_of, problems_of, value_of

from torchtitan.config.compat import keys as tables
from torchtitan.config.errors import ConfigError
from torchtitan.config.fields import free_table_of, known_keys
from torchtitan.config.load import load_config
from torchtitan.handlers.registry import HANDLERS

ROOT = Path(__file__).parents[3]

# the tables


def test_a_key_is_either_today_s_or_older():
    built = sorted(set(tables.OLD_KEYS) & set(known_keys()))
    assert built == [], "a section has these now: take them out of compat/keys.py"
    assert not set(tables.MISNAMED) & (set(known_keys()) | set(tables.OLD_KEYS))


@pytest.mark.parametrize("name", [name for name in tables.OTHER_TOOLS if name != "output"])
def test_a_name_of_another_tool_is_in_the_docs_with_today_s_key(name: str):
    today = tables.OTHER_TOOLS[name]
    assert today in known_keys() or free_table_of(today)
    pages = [ROOT / "docs" / "start" / f"from_{tool}.md" for tool in ("torchtune", "transformers")]
    rows = [row for page in pages for row in page.read_text().splitlines() if row[:1] == "|"]
    assert any(re.search(rf"`{name}\b", row) and f"`{today}" in row for row in rows)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("batch_size = 2", "batch_size: is a name of torchtune or transformers. Fix: write `train"),
        ("compile = true", "compile: has another name here. Fix: write `model.handlers`"),
        ("[args]\nsave_steps = 5", "args.save_steps: is a name of"),
        ("[job]\ngradient_accumulation_steps = 5", "batch size x accumulation"),
        ("[validation]\nbatch_size = 5", "did you mean `validation.local_batch_size`?"),
        (
            "model:\n  _component_: llama3",
            "Fix: a YAML file, as of torchtune: docs/start/from_torch",
        ),
        (["--batch_size", "2"], "write `--training.local_batch_size`"),
        (["batch_size=2"], "batch_size: needs dashes. Fix: write `--training.local_batch_size 2`"),
        (["debug_model", "optimizer.lr=1e-5"], "write `--optimizer.lr 1e-5`"),
        (["job.description=hf_abcdefghijklmnopqrstuvwxyz123456"], "looks like a secret"),
        (["--config", "a.toml"], "write the file alone, such as `torchtitan train a.toml`"),
    ],
)
def test_a_habit_of_other_tools_is_answered(written: str | list[str], answer: str, tmp_path: Path):
    path = tmp_path / "run.toml"
    if isinstance(written, str):
        path.write_text(written)
    arguments = [str(path)] if isinstance(written, str) else written
    problem = "\n".join(map(str, problems_of(partial(load_config, arguments))))
    assert answer in problem and "abcdefgh" not in problem


def test_the_sections_are_named_once():
    with pytest.raises(ConfigError) as caught:
        load_config(["--yyy.a=1", "--zzz.a=1"])
    first, second = caught.value.problems
    assert "[optimizer]" in first.fix and "named above" in second.fix


def test_the_handlers_of_the_tables_are_there():
    tables_of = [handler for handler, _ in tables.HANDLER_TABLES.values()]
    used = {*tables.HANDLER_SWITCHES.values(), *tables.CONVERTER_NAMES.values(), *tables_of}
    assert used <= set(HANDLERS)


def test_every_key_of_the_releases_is_known():
    assert len(EVERY_KEY) == 195
    assert [n for n in EVERY_KEY if n not in known_keys() and n not in tables.OLD_KEYS] == []


def test_the_tables_have_no_keys_but_the_releases():
    older_still = {"training.data_parallel_degree"}
    assert sorted(set(tables.OLD_KEYS) - set(EVERY_KEY) - older_still) == []


def test_what_old_names_lead_to_exists():
    not_built = {key for feature in tables.NOT_BUILT for key in feature.switches}
    not_built |= set(tables.NOT_BUILT_SETTINGS)
    for name in tables.OLD_KEYS:
        today = tables.TODAY.get(name, name)
        assert (
            today in known_keys()
            or free_table_of(today)
            or today in not_built
            or (today == name and (name in tables.IGNORED or name in tables.BY_OTHER_KEYS))
        ), name


# every key of every release


@pytest.mark.parametrize("release", COLUMNS)
def test_each_key_is_accepted_at_its_default(release: str, load):
    for name, default in COLUMNS[release].items():
        if default is not None:
            load({name: default})


@pytest.mark.parametrize("release", COLUMNS)
def test_each_key_is_accepted_at_its_default_as_a_flag(release: str):
    for name, default in COLUMNS[release].items():
        if name == "job.config_file" or default == "":  # `--x ''` is no value
            continue
        texts = [",".join(default) or "[]"] if isinstance(default, list) else [str(default)]
        load_config([f"--{name}", *texts])
        if isinstance(default, bool):
            section, _, key = name.rpartition(".")
            load_config([f"--{name}" if default else f"--{section}.no_{key}"])


@pytest.mark.parametrize("release", COLUMNS)
def test_all_defaults_of_a_release_together(release: str, load):
    keys = {name: value for name, value in COLUMNS[release].items() if value is not None}
    if release == "v0.2.2":
        del keys["model.hf_assets_path"], keys["training.dataloader.num_workers"]
    loaded = load(keys)
    assert loaded.config.model.handlers == ()
    assert loaded.config.handlers == {}
    told = [notice.split(" ")[0] for notice in loaded.notices]
    assert len(told) == len(set(told)), "one notice a key"


# renamed

VALUES = {
    "bool": (True, "true"),
    "int": (3, "3"),
    "float": (0.25, "0.25"),
    "str": ("x", "x"),
    "strings": (["a", "b"], "a,b"),
}
SPECIAL = {"parallelism.pipeline_parallel_schedule": ("GPipe", "GPipe")}


def plain_renames() -> list[tuple[str, str]]:
    return [(old, new) for old, new in tables.RENAMED.items() if new in known_keys()]


@pytest.mark.parametrize(("old", "new"), plain_renames())
def test_an_old_name_sets_today_s_key_and_says_so(old: str, new: str, load):
    value, text = SPECIAL.get(new) or VALUES[known_keys()[new].kind]
    loaded = load({old: value})
    assert value_of(loaded, new) == (tuple(value) if isinstance(value, list) else value)
    assert loaded.notices == (f"{old} is {new} today",)
    assert loaded.origins[new] == loaded.config.job.config_file
    for flag in (old, old.replace("_", "-")):
        from_flag = load_config([f"--{flag}", text])
        assert value_of(from_flag, new) == value_of(loaded, new)
        assert from_flag.notices == (f"--{old} is {new} today",)
        assert from_flag.origins[new] == "command line"


@pytest.mark.parametrize(("old", "new"), plain_renames())
def test_old_and_new_together_are_refused(old: str, new: str, load):
    value, text = SPECIAL.get(new) or VALUES[known_keys()[new].kind]
    problem = problem_of(partial(load, {old: value, new: value}))
    assert f"{old} = " in problem and f"is {new} today, and `{new}` is set too" in problem
    assert f"keep `{new}` alone" in problem
    problem = problem_of(partial(load_config, [f"--{old}", text, f"--{new}", text]))
    assert f"--{old} = " in problem and f"keep `--{new}` alone" in problem


def test_two_old_names_of_one_key_are_refused(load):
    keys = {"checkpoint.model_weights_only": True, "checkpoint.last_save_model_weights_only": True}
    problem = problem_of(partial(load, keys))
    assert "checkpoint.model_weights_only" in problem
    assert "`checkpoint.last_save_model_weights_only`" in problem or "is set too" in problem


def test_the_command_line_wins_whichever_names_both_use(load):
    key = "training.local_batch_size"
    assert value_of(load({"training.batch_size": 2}, "--training.batch_size", "4"), key) == 4
    assert value_of(load({"training.batch_size": 2}, f"--{key}", "4"), key) == 4
    assert value_of(load({key: 2}, "--training.batch_size", "4"), key) == 4
    loaded = load({"training.batch_size": "wrong"}, f"--{key}", "4")
    assert loaded.origins[key] == "command line"


def test_a_wrong_value_is_told_under_the_name_that_was_written(load):
    problem = problem_of(partial(load, {"training.batch_size": 0}))
    assert problem.startswith("training.batch_size = 0: must be more than 0")
    problem = problem_of(partial(load, {"training.batch_size": "8"}))
    assert problem.startswith('training.batch_size = "8": needs an integer')
    problem = problem_of(partial(load_config, ["--training.batch_size", "x"]))
    assert problem.startswith('training.batch_size = "x": needs an integer')
    assert "has no value" in problem_of(partial(load_config, ["--training.batch_size"]))


# converted


@pytest.mark.parametrize(
    ("old", "value", "new", "today"),
    [
        ("optimizer.fused", True, "optimizer.implementation", "fused"),
        ("optimizer.fused", False, "optimizer.implementation", "foreach"),
        *[
            (f"{section}.context_parallel_rotate_method", old, new_key, new)
            for section in ("experimental", "parallelism")
            for new_key in ["parallelism.context_parallel_method"]
            for old, new in (("allgather", "allgather"), ("alltoall", "ring"))
        ],
        ("experimental.custom_import", "json", "job.custom_import", ("json",)),
        ("experimental.custom_import", "", "job.custom_import", ()),
        ("model.name", "llama", "model.name", "llama3"),
        (
            "experimental.pipeline_parallel_split_points",
            "layers.2, layers.4",
            "parallelism.pipeline_parallel_split_points",
            ("layers.2", "layers.4"),
        ),
    ],
)
def test_a_value_is_converted(old: str, value: Any, new: str, today: Any, load):
    loaded = load({old: value})
    assert value_of(loaded, new) == today
    assert len(loaded.notices) == 1 and loaded.notices[0].startswith(old)
    if value != "":
        assert value_of(load_config([f"--{old}", str(value)]), new) == today


def test_a_converted_value_is_told(load):
    (notice,) = load({"optimizer.fused": False}).notices
    assert notice == 'optimizer.fused = false is optimizer.implementation = "foreach" today'
    (notice,) = load({"model.name": "llama"}).notices
    assert notice == 'model.name = "llama" is "llama3" today'


def test_none_on_the_command_line_leaves_a_key_unset(load):
    for name in EVERY_KEY:
        if any(name in column and column[name] is None for column in COLUMNS.values()):
            load_config([f"--{name}", "None"]) if name not in ("job.config_file",) else None
    flags = ["--debug.seed", "None", "--parallelism.context_parallel_load_balancer", "None"]
    loaded = load({"debug.seed": 5}, *flags, "--parallelism.module_fqns_per_model_part", "None")
    assert loaded.config.debug.seed == 0
    assert loaded.config.parallelism.context_parallel_load_balancer == "none"
    assert loaded.config.parallelism.module_fqns_per_model_part == ()
    assert load_config(["--training.seed", "None"]).config.debug.seed == 0


def test_microbatches_become_their_size(load):
    keys = {"experimental.pipeline_parallel_degree": 2, "training.batch_size": 8}
    old, new = tables.MICROBATCHES, tables.MICROBATCH_SIZE
    loaded = load({**keys, old: 4})
    assert value_of(loaded, new) == 2
    assert f"{old} = 4 is {new} = 2 today" in loaded.notices
    assert value_of(load({**keys, old: 4}, "--training.local_batch_size", "16"), new) == 4
    assert value_of(load(keys, f"--{old}", "2"), new) == 4
    assert load(keys, f"--{old}", "2").origins[new] == "command line"
    assert value_of(load({**keys, old: 3}, f"--{new}", "1"), new) == 1
    problem = problem_of(partial(load, {**keys, old: 3}))
    assert "cannot be cut into 3 microbatches" in problem and f"write {new} instead" in problem
    assert "cannot be cut into 0" in problem_of(partial(load, {**keys, old: 0}))
    assert value_of(load({"training.batch_size": 8, old: 3}), new) == 1  # no pipeline


# what is still unknown


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("experimental.pipeline_parallel_degre", "parallelism.pipeline_parallel_degree"),
        ("training.batch_sice", "training.local_batch_size"),
        ("fault_tolerance.enabel", "fault_tolerance.enable"),
        ("quantize.linear.float8.filter_fqn", "handlers.float8.filter_fqns"),
    ],
)
def test_a_misspelt_old_key_is_an_error_with_what_was_meant(name: str, meant: str, load):
    problem = problem_of(partial(load, {name: 1}))
    assert problem.startswith(f"{name}: is unknown") and f"did you mean `{meant}`?" in problem
    problem = problem_of(partial(load_config, [f"--{name}", "1"]))
    assert f"did you mean `--{meant}`?" in problem


def test_keys_like_none_of_them_still_get_a_guess():
    problem = problem_of(partial(load_config, ["--metrics.enable_tensorbord", "1"]))
    assert "`--metrics.enable_tensorboard`" in problem


def test_names_that_nothing_ever_had():
    problem = problem_of(partial(load_config, ["--optimizer.learning_rate", "1"]))
    assert "is a name of torchtune or transformers. Fix: write `--optimizer.lr`" in problem


def test_empty_old_tables_are_nothing(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text("[experimental]\n[float8]\n[quantize.linear.float8]\n[validation]\n")
    assert load_config([str(path)]).notices == ()


def test_a_quoted_old_name_is_still_told(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('"training.batch_size" = 4\n')
    assert "quoted key" in problem_of(partial(load_config, [str(path)]))
