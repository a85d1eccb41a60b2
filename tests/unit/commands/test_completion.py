"""`torchtitan completion`, in real shells: what the Tab key would offer."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from torchtitan.commands.completion import script
from torchtitan.config.shipped import CLONE

script = cache(script)  # one is made in half a second

CASES = [
    ("", "train", "export"),
    ("tra", "train", None),
    ("config ", "show", "copy"),
    ("config copy llama3_8", "llama3_8b", "llama3_8b_128k"),
    ("train debug_", "debug_model", "debug_4d"),
    ("config diff debug_model debug_", "debug_model", "debug_4d"),
    ("train docs/examples/ch", "docs/examples/chat.toml", None),
    ("train my.toml --training.st", "--training.steps", None),
    ("train my.toml --handlers.lora.ra", "--handlers.lora.rank", None),
    ("train my.toml --optimizer.name ", "AdamW", "Muon"),
    ("train my.toml --training.dtype bf", "bfloat16", None),
    ("train my.toml --model.handlers flo", "float8", None),
    ("train my.toml --checkpoint.enable ", "true", "false"),
    ("train my.toml --training.dataset_path doc", "docs", None),
    ("train --help lr_s", "lr_scheduler", "lr_scheduler.warmup_steps"),
    ("help expo", "export", None),
    ("help training.ste", "training.steps", None),
    ("replay RUN 5 --training.ste", "--training.steps", None),
    ("list ma", "masks", None),
    ("export --format ", "gguf", "meta"),
    ("status doc", "docs", None),
]


def candidates_in_bash(line: str, folder: Path) -> list[str]:
    (folder / "torchtitan.bash").write_text(script("bash"))
    program = """
        source "$0"
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _shtab_torchtitan 2>/dev/null  # compopt works below a real Tab key only
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    words = ["torchtitan", *line.split(" ")]
    command = ["bash", "-c", program, str(folder / "torchtitan.bash"), *words]
    return subprocess.check_output(command, text=True, cwd=CLONE).split()


def candidates_in_fish(line: str, folder: Path) -> list[str]:
    (folder / "torchtitan.fish").write_text(script("fish"))
    program = f"source {folder / 'torchtitan.fish'}; complete -C 'torchtitan {line}'"
    command = ["fish", "--no-config", "-c", program]
    output = subprocess.check_output(command, text=True, cwd=CLONE)
    return [word.partition("\t")[0].rstrip("/") for word in output.splitlines()]


SHELLS = {"bash": candidates_in_bash, "fish": candidates_in_fish}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_tab_key_offers_what_fits(shell: str, tmp_path: Path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for line, first, other in CASES:
        offered = SHELLS[shell](line, tmp_path)
        assert {first, other or first} <= set(offered), line
        assert other or len(offered) == 1, line


def test_zsh_can_read_its_script(tmp_path: Path):
    path = tmp_path / "_torchtitan"
    path.write_text(script("zsh"))
    assert "--training.steps" in path.read_text()
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    subprocess.run(["zsh", "-n", str(path)], check=True)
