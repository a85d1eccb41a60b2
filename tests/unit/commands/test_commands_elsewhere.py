"""Words of other tools, and configs, where a command should be: the answer works as it stands."""

import re
import shlex

import pytest

from torchtitan.cli import main
from torchtitan.commands.elsewhere import INSTEAD, elsewhere
from torchtitan.commands.table import COMMANDS, build_parser, parse


def test_no_word_is_a_command_here():
    assert not {*INSTEAD} & {*COMMANDS}


@pytest.mark.parametrize("word", INSTEAD)
def test_what_to_type_instead_is_a_command(word: str):
    fix = elsewhere([word])
    assert fix is not None
    commands = re.findall(r"`(?:torchrun [^`]*-m )?(torchtitan [^`]+)`", fix)
    assert commands or "tensorboard" in fix or "touch" in fix
    for command in commands:
        assert parse(shlex.split(command)[1:]) is not None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ls", "Fix: use `torchtitan list configs`"),
        ("cp llama3_8b my.toml", "`torchtitan config copy llama3_8b my.toml`"),
        ("cp llama3_1/8B_qlora my.yaml", "copy finetune_llama3_8b_qlora my.toml`"),
        ("run lora_finetune --config llama3/8B_lora", "`torchtitan train finetune_llama3_8b_lora`"),
        ("run full_finetune --config llama3/8B_full", "`torchtitan train finetune_llama3_8b`"),
        ("run --config my.toml", "`torchtitan train my.toml`"),
        ("run llama3_8b", "-m torchtitan train llama3_8b`"),
        ("finetune-lora", "`torchtitan train finetune_llama3_8b_lora`"),
        ("models", "write `torchtitan list models`"),
        ("my.toml --training.steps 5", "write `torchtitan train my.toml --training.steps 5`"),
        ("llama3_8b", "write `torchtitan train llama3_8b`"),
        ("--training.steps=5 my.toml", "write `torchtitan train --training.steps=5 my.toml`"),
        ("help ls", "use `torchtitan list configs`"),
        ("help trian", 'did you mean "train"?'),
        ("config ls", "choose from show, diff, copy"),
    ],
)
def test_a_word_of_another_tool_says_what_to_use(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and not captured.out


def test_every_command_is_listed_once_below_its_group(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for name, command in COMMANDS.items():
        assert command.group, f"{name} has no group"
        [block] = [block for block in text.split("\n\n") if block.startswith(f"{command.group}:")]
        assert len(re.findall(rf"^  {name} ", text, re.MULTILINE)) == 1
        assert f"  {name} " in block and command.summary in block


def test_the_help_of_all_commands_is_at_hand():
    texts = dict(build_parser().help_texts())
    assert {*COMMANDS} < {*texts}
    assert "usage: torchtitan config copy" in texts["config copy"]
    assert texts["train"].startswith("usage: torchtitan train")


def test_rows_are_shown_for_a_shipped_config(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "show", "debug_model", "--samples=0", "--rows=5"]) == 0
    assert "5 rows, 5 samples" in capsys.readouterr().out
