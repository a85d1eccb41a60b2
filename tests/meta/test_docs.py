"""What README and docs tell users to type, and the keys they name, exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from torchtitan.cli import _WORDS
from torchtitan.config.errors import ConfigError
from torchtitan.config.fields import free_table_of, known_keys, known_sections
from torchtitan.config.legacy import is_old_key, is_old_section
from torchtitan.config.load import load_config
from torchtitan.tools.download import parse_arguments

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    + list((ROOT / "docs").rglob("*.md"))
)
# Programs of others: what they are told is theirs to check.
FOREIGN = {
    "cd",
    "export",
    "git",
    "hf",
    "jq",
    "kill",
    "ls",
    "pip",
    "pre-commit",
    "source",
    "ssh",
    "tail",
    "tensorboard",
    "torch.distributed.checkpoint.format_utils",
    "torch.distributed.flight_recorder.fr_trace",
    "wandb",
}


def commands(page: Path) -> list[str]:
    """The commands of the page's bash blocks, without comments, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.split("#")[0].strip()]


def problem_of(command: str) -> str | None:
    """Why the command cannot work; None if it can."""
    words = shlex.split(command, comments=True)
    environment = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    config = environment.get("CONFIG_FILE", "train_configs/debug_model.toml")
    program, *rest = words
    if program in ("python", "python3", "torchrun") and "-m" in rest:
        program, rest = rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :]
    if program == "torchtitan.train":
        return _problem_of_arguments(rest)
    if program == "torchtitan" and rest[:1] == ["train"]:
        return _problem_of_arguments(rest[1:])
    if program == "torchtitan" and rest[:1] == ["doctor"]:
        return _problem_of_arguments(rest[1:])
    if program == "torchtitan" and rest[:1] == ["download"]:
        return _problem_of_download(rest[1:])
    if program == "python" and rest[0].startswith("scripts/download_"):
        return _missing(rest[0]) or _problem_of_download(rest[1:])
    if program == "torchtitan":
        return None if rest[0] in {*_WORDS, "--version", "--help"} else "no such word"
    if program == "./run_llama_train.sh":
        return _problem_of_arguments(["--job.config_file", config, *rest])
    if program == "sbatch":
        at = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        missing = _missing(rest[at])
        return missing or _problem_of_arguments(["--job.config_file", config, *rest[at + 1 :]])
    if program in ("python", "python3", "./run_tests.sh", ".ci/run"):
        named = [word for word in [program, *rest] if "/" in word and "=" not in word]
        return next(filter(None, map(_missing, named)), None)
    return None if program in FOREIGN else f"unknown program {program}"


def _problem_of_arguments(arguments: list[str]) -> str | None:
    if "--help" in arguments:
        return None
    if "--check" in arguments:
        arguments = [word for word in arguments if word not in ("--check", "full")]
    try:
        load_config(arguments)
    except ValueError as error:
        return str(error)
    return None


def _problem_of_download(arguments: list[str]) -> str | None:
    try:
        parse_arguments(arguments)
    except ConfigError as error:
        return str(error)
    return None


def _missing(name: str) -> str | None:
    return None if (ROOT / name.partition("::")[0]).exists() else f"{name} does not exist"


ALL_COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), ALL_COMMANDS)
def test_command_works(page: str, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert problem_of(command) is None


def test_commands_are_found_and_can_be_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert {"README.md", "launching.md"} <= {page for page, _ in ALL_COMMANDS}
    assert problem_of("NGPU=2 ./run_llama_train.sh --training.stepz 5")
    assert problem_of("CONFIG_FILE=train_configs/no.toml ./run_llama_train.sh")
    assert problem_of("torchrun --nproc_per_node 2 -m torchtitan.train --trainign.steps 5")
    assert problem_of("torchtitan tarin")
    assert problem_of("torchtitan download --repo_idd a/b")
    assert problem_of("python scripts/download_tokenizer.py --repo a/b")
    assert problem_of("python scripts/no_such.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_bash_blocks_are_bash(page: Path):
    run = subprocess.run(
        ["bash", "-n"], input="\n".join(commands(page)), text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr


def unknown_keys(text: str) -> list[str]:
    """Dotted names in the text that begin with a section's name and are no key."""
    sections = {name for name in known_sections() if "." not in name} - {"data"}  # data.py, data.md
    names = re.findall(r"(?:--|`)([a-z_]+(?:\.[a-z0-9_]+)+)\b(?!\()", text)
    return [
        name
        for name in names
        if name.split(".")[0] in sections
        and name.replace(".no_", ".") not in known_keys()
        and name not in known_sections()
        and not free_table_of(name)
        and not name.endswith((".py", ".toml", ".md", ".json", ".jsonl"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path):
    unknown = unknown_keys(page.read_text())
    if page.name == "from_torchtitan.md":  # the one page about older keys
        unknown = [name for name in unknown if not (is_old_key(name) or is_old_section(name))]
    assert unknown == []


def test_unknown_keys_are_noticed():
    assert unknown_keys("set `training.stepz` or --job.dumpfolder") == [
        "training.stepz",
        "job.dumpfolder",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [t for t in local if not os.path.exists(page.parent / t)] == []


def test_the_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    pages = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f"]({page})" not in readme] == []


def test_the_tree_in_the_readme_exists():
    block = re.search(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)
    assert block
    folder, missing = ROOT, []
    for line in block[1].splitlines():
        name = line.split()[0]
        base = folder if line.startswith("  ") else ROOT
        if not (base / name).exists():
            missing.append(name)
        if not line.startswith("  "):
            folder = ROOT / name
    assert missing == []
