"""`torchtitan train --help SECTION | KEY`: what it says can be written as it stands."""

import re
import shlex

import pytest

from torchtitan.cli import main
from torchtitan.commands.config import free_tables
from torchtitan.commands.table import parse
from torchtitan.config.cli_args import parse_command_line
from torchtitan.config.errors import ConfigError
from torchtitan.config.fields import TOP_KEYS, known_keys, known_sections
from torchtitan.config.help_text import OVERVIEW, print_help
from torchtitan.config.schema import JobConfig
from torchtitan.config.toml_file import tomllib

KEYS = [
    *known_keys(),
    *("handlers.lora.rank", "handlers.lora.targets", "handlers.lora.rslora"),
    *("loss.args.beta", "optimizer.args.momentum", "model.args.n_layers"),
]


def shown(topic: str, capsys: pytest.CaptureFixture[str]) -> str:
    print_help(free_tables(), topic)
    return capsys.readouterr().out


def leaf(values: dict, name: str) -> object:
    for part in name.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("name", [name for name in KEYS if name not in ("handlers", "sinks")])
def test_the_examples_of_a_setting_are_valid_and_mean_the_same(
    name: str, capsys: pytest.CaptureFixture[str]
):
    text = shown(name, capsys)
    if "In the TOML:" not in text:  # a table, whose settings are shown
        assert name in ("model.args", "loss.args", "optimizer.args")
        return
    _, _, rest = text.partition("In the TOML:\n\n")
    toml, _, rest = rest.partition("\n\nOn the command line:\n\n")
    value = leaf(tomllib.loads(toml), name)
    words = shlex.split(rest.partition("\n")[0])
    assert words[:3] == ["torchtitan", "train", "my.toml"]
    parsed = parse_command_line(words[3:])
    assert not parsed.problems
    if not isinstance(value, dict):
        assert parsed.values == {name: value}
    JobConfig.model_validate(tomllib.loads(toml))


def test_the_overview_is_short_and_names_every_section(capsys: pytest.CaptureFixture[str]):
    text = shown(OVERVIEW, capsys)
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 100
    examples = re.findall(r"^  torchtitan (train (?!--help).*?)(?:  |$)", text, re.MULTILINE)
    assert len(examples) >= 3
    for line in examples:
        options = parse(line.split())
        assert options and not parse_command_line(options.settings).problems
    assert all(re.search(rf"^  {section} +\w", text, re.MULTILINE) for section in known_sections())


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ("training", "--training.steps INT"),
        ("[training]", "--training.steps INT"),
        ("handlers", "[handlers.lora]: rank, alpha"),
        ("lora", "--handlers.lora.rank INT"),
        ("handlers.lora", "--handlers.lora.rslora TOML"),
        ("loss", "[loss.args] of dpo: variant"),
        ("loss.args", "[loss.args] of distillation"),
        ("training.steps", "debug_mixture"),
        ("--training.seq-len", "training.seq_len: integer > 0 (default: 2048)"),
        ("lr", "optimizer.lr: number >= 0"),
        ("num_workers", "--validation.dataloader.num_workers"),
        ("batch_size", "batch_size is training.local_batch_size here."),
        ("output_dir", "output_dir is job.dump_folder here."),
        ("dpo", "--loss.args.variant"),
        ("training.batch_size", "training.batch_size is training.local_batch_size here."),
        ("training.local_batch_size", "Older names, of TorchTitan: training.batch_size"),
        ("data.sources", "weight: Share of the tokens"),
        ("optimizer.args.momentum", "optimizer.args.momentum of SGD"),
        ("training.steps", "See also: data.epochs"),
        ("optimizer.name", "On the command line"),
    ],
)
def test_a_topic_is_found(topic: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert expected in shown(topic, capsys)


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("trainign", 'did you mean "training"?'),
        ("training.stepz", 'did you mean "training.steps"?'),
        ("handlers.lora.rnk", 'did you mean "handlers.lora.rank"?'),
        ("seqlen", 'did you mean "seq_len"?'),
        ("experimental", "its keys are parallelism.context_parallel_degree, "),
        ("fault_tolerance.enable", "docs/start/from_torchtitan.md"),
    ],
)
def test_an_unknown_topic_is_refused_with_a_hint(
    topic: str, hint: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        print_help(free_tables(), topic)
    assert main(["train", "--help", topic]) == 2
    assert hint in (error := capsys.readouterr().err) and error.startswith(f"error: help {topic}")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--help", "training.steps"],
        ["train", "--help=training.steps"],
        ["train", "debug_model", "-h", "training.steps"],
        ["train", "--training.steps", "--help"],
        ["help", "training.steps"],
        ["help", "train", "training.steps"],
    ],
)
def test_help_on_a_setting_is_asked_for_in_many_ways(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("training.steps: integer > 0 (default: 10000)")


@pytest.mark.parametrize(
    "topic", ["checkpoint.enable", "compile", "lora", "handlers", "steps", "metrics"]
)
def test_help_prefers_settings_to_commands_of_like_names(
    topic: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["help", topic]) == 0
    assert topic in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AdamW", "of `torchtitan list optimizers`: uses beta1"), ("dpo", "--loss.args.variant")],
)
def test_help_knows_registered_names(name: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(["help", name]) == 0
    assert expected in capsys.readouterr().out


def test_a_config_after_help_is_no_topic(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help", "debug_model"]) == 0
    assert "Sections:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topic", "name"), [("base", "base"), ("extends", "base"), ("unset", "unset")]
)
def test_the_keys_at_the_top_of_a_file_are_explained(topic: str, name: str, capsys):
    text = shown(topic, capsys)
    assert f"TOML:\n\n  {TOP_KEYS[name].example}\n" in text
    assert TOP_KEYS[name].doc.split()[-1] in text
