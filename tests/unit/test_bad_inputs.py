"""Bad settings are refused before anything starts, with the key, the reason and a way out.

Each case is a TOML and arguments, the phase that must catch it, and texts that the problem must
contain. The cases of files and folders are tested beside the code that reads them.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import ARITHMETIC, errors_of, preflight

OWN = "; for one of your own, name its module in job.custom_import"


@dataclass
class Bad:
    name: str
    expected: list[str]
    toml: str | bytes | None = None
    arguments: list[str] = field(default_factory=list)
    world_size: int = 1


def section(name: str, *lines: str) -> str:
    return "\n".join([f"[{name}]", *lines]) + "\n"


SYNTAX = [
    Bad("no-file", ["no_such.toml: does not exist"], arguments=["no_such.toml"]),
    Bad("folder", ["is a folder"], arguments=["/"]),
    Bad("large", ["is larger than 1 MB"], "#" + "x" * 1_000_001),
    Bad("syntax", [":2:9", "not valid TOML", "steps = x"], "[training]\nsteps = x\n"),
    Bad("not-utf-8", [":2:2", "is not UTF-8: byte 0xff"], b"[training]\n#\xff\n"),
    Bad("nul", [":2:2", "NUL byte"], b"[training]\n#\0\n"),
    Bad("digits", ["a number that is too long"], "[training]\nsteps = " + "9" * 5_000),
    Bad("deep", ["nested too deeply"], "a = " + "[" * 20_000),
    Bad("duplicate-key", [":3:", "steps = 2", "keep one"], "[training]\nsteps = 1\nsteps = 2\n"),
    Bad("duplicate-table", [":2:", "[job]", "keep one of the two"], "[job]\n[job]\n"),
    Bad("secret-in-excerpt", ["<hidden>"], 'hf_token = "abcdefgh\n'),
]
KEYS = [
    Bad("section", ["trainign: is not a section", 'mean "training"?'], "[trainign]\n"),
    Bad("top-level", ["seed: belongs in section [debug]", "`debug.seed`"], "seed = 1\n"),
    Bad("top-level-unknown", ["zzz: is not a section", "[training], "], "zzz = 1\n"),
    Bad(
        "key",
        ["is unknown", "did you mean `training.steps`?", "Keys of [training]:", "local_batch_size"],
        section("training", "step = 1"),
    ),
    Bad(
        "nested-key",
        ["training.dataloader.workers", "`training.dataloader.num_workers`"],
        section("training.dataloader", "workers = 1"),
    ),
    Bad(
        "key-of-args",
        ["Keys of [loss]: args, name; what loss.name chooses has its own settings in [loss.args]"],
        section("loss", "z_loss_weight = 1e-4"),
    ),
    Bad("wrong-section", ["belongs in section [optimizer]"], section("training", "lr = 1.0")),
    Bad(
        "renamed",
        ["training.batch_size = 0: must be more than 0"],
        section("training", "batch_size = 0"),
    ),
    Bad(
        "old-and-new",
        ["is training.local_batch_size today, and `training.local_batch_size` is set too"],
        section("training", "batch_size = 1\nlocal_batch_size = 1"),
    ),
    Bad(
        "not-built",
        ["fault_tolerance.enable = true: this library does not have fault tolerance by replicas"],
        section("fault_tolerance", "enable = true"),
    ),
    Bad(
        "not-built-flag",
        ["--activation_checkpoint.debug = true"],
        arguments=["--activation_checkpoint.debug"],
    ),
    Bad("quoted", ["write `steps` in [training], without quotes"], '"training.steps" = 1\n'),
    Bad(
        "quoted-in-its-section",
        ['"training.steps": is one quoted', "write `steps` in [training]"],
        section("training", '"training.steps" = 1'),
    ),
    Bad(
        "quoted-in-another-section",
        ["write `seed` in [debug]"],
        section("training", '"debug.seed" = 1'),
    ),
    Bad(
        "quoted-nested",
        ["write `num_workers` in [training.dataloader]"],
        section("training", '"dataloader.num_workers" = 1'),
    ),
    Bad(
        "section-in-section",
        ["names the section [training] inside a section", "without `training.`"],
        section("training", "training.steps = 1"),
    ),
    Bad("scalar-section", ["training = 5: is a section"], "training = 5\n"),
    Bad("flag", ["--training.stepz", "`--training.steps`"], arguments=["--training.stepz", "1"]),
    Bad("flag-section", ["belongs in section [optimizer]"], arguments=["--training.lr", "1"]),
    Bad("flag-no", ["--no-training.stepz"], arguments=["--no-training.stepz"]),
    Bad("flag-no-of-number", ["--no-training.steps"], arguments=["--no-training.steps"]),
    Bad("flag-no-value", ["--job.no-new-run", "no value"], arguments=["--job.no-new-run=true"]),
    Bad("single-dash", ["-x: is not a flag"], arguments=["-x"]),
    Bad("flag-missing-value", ["--training.steps: has no value"], arguments=["--training.steps"]),
    Bad("flag-empty-value", ["--training.steps: has no value"], arguments=["--training.steps="]),
    Bad("flag-empty-list", ["--model.handlers: has no value"], arguments=["--model.handlers="]),
    Bad("free-missing", ["--model.args.dim: has no value"], arguments=["--model.args.dim"]),
    Bad("bad-literal", ["is not TOML"], arguments=["--optimizer.param_groups", "[{"]),
    Bad(
        "two-files",
        ["b.toml: is a second config file besides a.toml", "leave one out"],
        arguments=["a.toml", "b.toml"],
    ),
    Bad("word-and-file", ["foo: is a second", "`--check full`"], arguments=["a.toml", "foo"]),
    Bad("file-and-word", ["besides foo", "`--check full`"], arguments=["foo", "a.toml"]),
    Bad("section-as-flag", ["is a section", "keys: allow_"], arguments=["--checkpoint"]),
    Bad("word", ["full: does not exist", "bare word", "`--check full`"], arguments=["full"]),
    Bad("special-flag", ["--chek: is unknown", "mean `--check`?"], arguments=["--chek", "a.toml"]),
    Bad("handler-scalar", ["handlers.compile = 1: needs a table"], "[handlers]\ncompile = 1\n"),
    Bad("secret-key", ["looks like a secret", "HF_TOKEN"], section("job", 'hf_token = "abc"')),
    Bad("secret-table", ["looks like a secret"], section("hub", 'token = "abc"')),
    Bad("secret-alone", ["looks like a secret", "HF_TOKEN"], 'hf_token = "abc"\n'),
    Bad("secret-free", ["model.args.api_key"], section("model.args", 'api_key = "abc"')),
    Bad(
        "no-secret",
        ["training.token_weight: is unknown", "loss.token_weights: is unknown"],
        section("training", "token_weight = 0.5") + section("loss", "token_weights = [0.5]"),
    ),
    Bad(
        "no-secret-in-flag",
        ["--loss.token_weight: is unknown"],
        arguments=["--loss.token_weight", "0.5"],
    ),
    Bad("secret-flag", ["--hf_token: looks like a secret"], arguments=["--hf_token", "abc"]),
    Bad(
        "secret-value",
        ["job.description: looks like a secret"],
        section("job", 'description = "hf_abcdefghijklmnopqrstuvwxyz"'),
    ),
    Bad(
        "secret-value-in-flag",
        ["--job.description: looks like a secret"],
        arguments=["--job.description", "hf_abcdefghijklmnopqrstuvwxyz"],
    ),
    Bad(
        "secret-list",
        ["job.custom_import: looks like a secret"],
        section("job", 'custom_import = ["hf_abcdefghijklmnopqrstuvwxyz"]'),
    ),
    Bad(
        "secret-list-in-flag",
        ["--data.sources: looks like a secret"],
        arguments=["--data.sources", '[{path = "s3://me:hf_abcdefghijklmnopqrstuvwxyz@host/x"}]'],
    ),
    Bad(
        "secret-half-a-list-in-flag",
        ["--data.sources: looks like a secret"],
        arguments=["--data.sources", '[{path = "hf_abcdefghijklmnopqrstuvwxyz"'],
    ),
    Bad(
        "secret-file",
        ["<hidden>: looks like a secret"],
        arguments=["hf_abcdefghijklmnopqrstuvwxyz"],
    ),
    Bad(
        "secret-number",
        ["training.max_norm: looks like a secret", "needs a number"],
        section("training", 'max_norm = "hf_abcdefghijklmnopqrstuvwxyz"'),
    ),
    Bad(
        "secret-free-flag",
        ["--handlers.mine.api_key: looks like a secret"],
        arguments=["--handlers.mine.api_key", "abc"],
    ),
    Bad(
        "secret-older-key",
        ['fault_tolerance.semi_sync_method = "<hidden>"'],
        section("fault_tolerance", 'semi_sync_method = "hf_abcdefghijklmnopqrstuvwxyz"'),
    ),
    Bad(
        "older-setting-and-no-table",
        ["handlers.float8 = 3", "needs a table"],
        section("float8", "emulate = true"),
        ["--handlers.float8", "3"],
    ),
    Bad("digits-flag", ["needs an integer"], arguments=["--training.steps", "9" * 5_000]),
]


def integer(value: str, *expected: str) -> Bad:
    toml = section("training", f"steps = {value}")
    return Bad(f"integer {value}", [f"training.steps = {expected[0]}: ", *expected[1:]], toml)


def value(where: str, literal: str, *expected: str) -> Bad:
    table, _, key = where.rpartition(".")
    return Bad(f"{where} {literal}", [where, *expected], section(table, f"{key} = {literal}"))


VALUES = [
    integer('"8"', '"8"', "needs an integer, and this is text", "10000, without quotes"),
    integer("8.0", "8.0", "this is a decimal number", "write an integer"),
    integer("1e3", "1000.0", "write an integer"),
    integer("8.5", "8.5", "write an integer"),
    integer("true", "true", "this is a boolean"),
    integer("1979-05-27", '"1979-05-27"', "this is a date"),
    integer("{a = 1}", "\"{'a': 1}\"", "this is a table"),
    integer("[1]", "[1]", "this is a list"),
    integer("nan", "nan", "needs an integer"),
    integer("9223372036854775808", "9223372036854775808", "does not fit in 64 bits"),
    integer("0", "0", "must be more than 0", "choose a number > 0; the default is 10000"),
    value("training.seq_len", "0", "more than 0"),
    value("training.local_batch_size", "-1", "more than 0"),
    value("training.global_batch_size", "-2", "at least -1"),
    value("training.gc_freq", "0", "more than 0"),
    value("training.max_seconds", "0", "more than 0"),
    value("training.max_norm", "0.0", "more than 0", "> 0, or `inf`; the default is 1.0"),
    value("training.max_norm", "nan", "training.max_norm = nan"),
    value("training.dtype", '"float16"', "is not a choice", "bfloat16"),
    value("training.dtype", "16", "is not a choice"),
    value("training.mixed_precision_param", '"bf16"', "choose from"),
    value("training.document_mask", "1", "needs true or false, and this is an integer"),
    value("training.document_mask", '"true"', "write true or false, without quotes"),
    value("parallelism.module_fqns_per_model_part", '"a"', "needs a list", "for example [["),
    value("parallelism.module_fqns_per_model_part", '["a"]', '[0] = "a": needs a list', '[["tok'),
    value("parallelism.module_fqns_per_model_part", "[[1]]", "[0][0] = 1: needs text"),
    value("parallelism.pipeline_parallel_schedule", '"1f1b"', 'did you mean "1F1B"?'),
    value("training.dataset_path", "5", "write text"),
    value("training.dataloader.num_workers", "-1", "at least 0"),
    value("training.dataloader.prefetch_factor", "0", "more than 0"),
    value("metrics.log_freq", "0", "more than 0"),
    value("checkpoint.interval", "0", "more than 0"),
    value("checkpoint.load_step", "-2", "at least -1"),
    value("comm.init_timeout_seconds", "0", "more than 0"),
    value("comm.train_timeout_seconds", "-5", "more than 0"),
    value("optimizer.lr", "-1.0", "at least 0"),
    value("optimizer.lr", "nan", "not a finite number"),
    value("optimizer.lr", "inf", "not a finite number"),
    value("optimizer.lr", "true", "this is a boolean"),
    value("optimizer.beta1", "1.0", "less than 1", ">= 0, < 1"),
    value("optimizer.beta2", "-0.1", "at least 0"),
    value("optimizer.eps", "0.0", "more than 0"),
    value("optimizer.weight_decay", "-0.1", "at least 0"),
    value("lr_scheduler.decay_ratio", "1.5", "at most 1"),
    value("lr_scheduler.min_lr_factor", "-0.5", "at least 0"),
    value("lr_scheduler.decay_type", '"cosin"', 'did you mean "cosine"?', "linear, sqrt, cosine"),
    value("debug.seed", "-1", "at least 0"),
    value("debug.seed", "9223372036854775808", "does not fit in 64 bits"),
    value("job.device", '"gpu"', "choose from auto, cpu, cuda"),
    value("job.custom_import", '"a.b"', "needs a list", 'for example ["my_project.models"]'),
    value("model.handlers", '["a", 1]', "model.handlers[1] = 1"),
    value("model.args", "5", "is a section"),
    value("model.args.rope_theta", "inf", "is not a finite number"),
    value("model.args.dim", "9223372036854775808", "does not fit in 64 bits"),
    value("model.args.date", "1979-05-27", "is a date"),
    value("activation_checkpoint.mode", '"selectiv"', 'did you mean "selective"?'),
    value("activation_checkpoint.selective_ac_option", '"0"', 'neither "op" nor'),
    value("activation_checkpoint.selective_ac_option", "2", "write text"),
    value("optimizer.param_groups", '[{patern = "a"}]', 'did you mean "pattern"?', "is missing"),
    value("optimizer.param_groups", '[{pattern = "a", lr_factor = 0.0}]', "[0].lr_factor"),
    value("data.sources", "[{wieght = 1}]", 'did you mean "weight"?', "weight: is missing"),
    value("data.sources", "[{weight = -1}]", "data.sources[0].weight = -1: must be at least 0"),
    value("data.sources", "[{weight = nan}]", "data.sources[0].weight", "not a finite number"),
    value("data.sources", '[{path = "hf_abcdefghijklmnopqrstuvwxyz01234567"}]', "like a secret"),
    value("data.sources", "5", "write a list, for example [{weight = 0.5}]"),
    Bad(
        "flag-type",
        ['training.steps = "two": needs an integer. Fix: write an integer, for example 10000'],
        arguments=["--training.steps", "two"],
    ),
    Bad("flag-whole", ["needs an integer. Fix: write"], arguments=["--training.steps=1e3"]),
    Bad("flag-not-whole", ["Fix: write an integer"], arguments=["--training.steps=8.5"]),
    Bad("flag-infinite", ["Fix: write an integer"], arguments=["--training.steps=inf"]),
    Bad("flag-choice", ["job.device"], arguments=["--job.device", "tpu"]),
]


@pytest.mark.fault("F56")
@pytest.mark.parametrize("bad", [*SYNTAX, *KEYS, *VALUES], ids=lambda bad: bad.name)
def test_refused_when_loading(bad: Bad, tmp_path: Path):
    message = problems_of_loading(bad, tmp_path)
    for text in bad.expected:
        assert text in message
    assert "Fix: " in message
    assert "hf_abcdefghijklmnopqrstuvwxyz" not in message
    assert "abcdefgh\n" not in message


def problems_of_loading(bad: Bad, folder: Path) -> str:
    arguments = list(bad.arguments)
    if bad.toml is not None:
        path = folder / "bad.toml"
        text = bad.toml if isinstance(bad.toml, bytes) else bad.toml.encode()
        path.write_bytes(text)
        arguments.append(str(path))
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    return str(caught.value)


LOCAL = "training.local_batch_size=8"
ARITHMETIC_CASES = [
    Bad("world", ["WORLD_SIZE = 8", "= 4"], None, ["parallelism.data_parallel_shard_degree=4"], 8),
    Bad("zero", ["at least 1, or -1"], None, ["parallelism.data_parallel_shard_degree=0"], 1),
    Bad("rest", ["cannot be divided"], None, ["parallelism.data_parallel_replicate_degree=3"], 8),
    Bad("tensor", ["divide model.args.n_heads"], None, ["parallelism.tensor_parallel_degree=3"], 3),
    Bad(
        "context-length",
        ["seq_len = 2050: is not a multiple of 4", "degree = 2", "such as 2052"],
        None,
        ["parallelism.context_parallel_degree=2", "training.seq_len=2050"],
        2,
    ),
    Bad(
        "context-heads",
        ["ulysses", "8 heads of queries and 4 of keys", "divisor of 4,", "allgather or ring"],
        None,
        [
            "parallelism.context_parallel_degree=16",
            "parallelism.context_parallel_method=ulysses",
        ],
        16,
    ),
    Bad("pipeline", ["has 6 layers", "6"], None, ["parallelism.pipeline_parallel_degree=7"], 7),
    Bad("batch", ["8 x 2 = 16", "such as 32"], None, ["training.global_batch_size=24", LOCAL], 2),
    Bad("small", ["8 x 2 = 16", "such as 16"], None, ["training.global_batch_size=8", LOCAL], 2),
    Bad("batch-zero", ["at least 1, or -1"], None, ["training.global_batch_size=0"], 1),
    Bad("lanes", ["data.lanes"], None, ["data.lanes=3"], 1),
    Bad("lanes-mesh", ["data.lanes", "2"], None, ["data.lanes=1"], 2),
    Bad("dataset", ['did you mean "stdlib"?'], None, ["training.dataset=stdlb"], 1),
    Bad("flavor", ["model.flavor", "8B"], None, ["model.flavor=9B"], 1),
    Bad("family", ['did you mean "llama3"?'], None, ["model.name=lama"], 1),
    Bad("optimizer", ['did you mean "AdamW"?'], None, ["optimizer.name=adamw"], 1),
    Bad("schedule", ["warmup_stable_decay"], None, ["lr_scheduler.name=warmup"], 1),
    Bad("sink", ["is not a sink", OWN], None, ["metrics.sinks=mine"], 1),
    Bad("own-handler", ["is not a handler", OWN], None, ["model.handlers=mine"], 1),
    Bad("own-handler-table", ["handlers.mine", OWN], None, ["handlers.mine.size=1"], 1),
    Bad("own-loss", ["is not a loss", OWN], None, ["loss.name=mine"], 1),
    Bad("own-optimizer", ["is not an optimizer", OWN], None, ["optimizer.name=xyz"], 1),
    Bad("own-schedule", ["is not a schedule", OWN], None, ["lr_scheduler.name=mine"], 1),
    Bad("own-dataset", ["training.dataset", OWN], None, ["training.dataset=mine"], 1),
    Bad("own-family", ["unknown model family", OWN], None, ["model.name=mine"], 1),
    Bad("args", ["n_layers"], None, ["model.args.n_layer=2"], 1),
    Bad(
        "args-type",
        ['model.args.n_layers = "two": needs an integer', "write an integer, for example"],
        None,
        ["model.args.n_layers=two"],
    ),
    Bad(
        "backend",
        ['handlers.compile.backend = "indictor": is not a choice', 'did you mean "inductor"?'],
        None,
        ["handlers.compile.backend=indictor"],
    ),
    Bad("heads", ["model.args.n_heads"], None, ["model.args.n_heads=7"], 1),
    Bad("layers", ["model.args.n_layers"], None, ["model.args.n_layers=0"], 1),
    Bad(
        "warmup",
        ["lr_scheduler.warmup_steps"],
        None,
        ["training.steps=10", "lr_scheduler.warmup_steps=11"],
        1,
    ),
]


@pytest.mark.parametrize("bad", ARITHMETIC_CASES, ids=lambda bad: bad.name)
def test_refused_by_arithmetic(bad: Bad):
    defaults = {"training.dataset": "stdlib"}
    given = dict(pair.split("=") for pair in bad.arguments)
    arguments = [f"--{key}={value}" for key, value in (defaults | given).items()]
    context = RunContext(load_config(arguments).config, bad.world_size, "cpu")
    message = "\n".join(map(str, errors_of(preflight(context, [ARITHMETIC]))))
    for text in bad.expected:
        assert text in message
    assert "Fix: " in message


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.toml"
    path.write_text("")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"run\.toml: cannot be read: Permission denied"):
        load_config([str(path)])
