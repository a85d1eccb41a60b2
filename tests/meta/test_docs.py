"""What README, docs and comments tell users to type, and the keys they name, exist."""

import ast
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from torchtitan.commands.list import lists
from torchtitan.commands.table import parse
from torchtitan.config.compat.keys import OLD_KEYS
from torchtitan.config.compat.translate import is_old_section
from torchtitan.config.fields import free_table_of, known_keys, known_sections
from torchtitan.config.load import load_config
from torchtitan.config.schema import JobConfig
from torchtitan.config.shipped import shipped_configs

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
    "mkdir",
    "pip",
    "pre-commit",
    "pytest",
    "source",
    "ssh",
    "tail",
    "tensorboard",
    "touch",
    "venv",
    "torch.distributed.checkpoint.format_utils",
    "torch.distributed.flight_recorder.fr_trace",
    "wandb",
}


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, page.read_text(), re.DOTALL | re.MULTILINE)


def saved_files(page: Path) -> dict[str, str]:
    """The blocks that a reader saves under the name in their first line, by that name."""
    found = [*blocks(page, "toml"), *blocks(page, "python")]
    named = [(re.match(r"# (\S+\.(?:toml|py))\n", text), text) for text in found]
    return {name[1]: text for name, text in named if name}


def commands(page: Path) -> list[str]:
    """The commands of the page's bash blocks, without comments, continued lines joined."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.split("#")[0].strip()]


def commands_in_comments(path: Path) -> list[str]:
    """Those at the top of a script or of a TOML, where a line or comment begins with one."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line[:1] == "#")
    text = re.sub(r" *\\\n *", " ", text)
    start = r"^ *((?:[A-Z_]+=\S+ )*(?:torchtitan|python scripts/\S+|sbatch|\./\w+\.sh)(?= |$).*)$"
    found = re.findall(start, text, re.MULTILINE)
    # What stands in brackets may be left out, and is written out all the same.
    plain = [re.sub(r"--section\.key value|\.\.\.|[][]", "", command) for command in found]
    return [re.split(r" {2,}|;", command.strip())[0] for command in plain]


def problem_of(command: str) -> str | None:
    """Why the command cannot work; None if it can."""
    words = shlex.split(command, comments=True)
    if ">" in words:  # and the file that it writes
        words = words[: words.index(">")]
    for joint in ("&&", "||", "|"):
        if joint in words:
            at = words.index(joint)
            return problem_of(shlex.join(words[:at])) or problem_of(shlex.join(words[at + 1 :]))
    environment = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    config = environment.get("CONFIG_FILE", "train_configs/debug_model.toml")
    program, *rest = words
    if program in ("srun", "mpirun"):
        program, *rest = rest[rest.index("torchtitan") :]
    if program in ("python", "python3", "torchrun") and "-m" in rest:
        program, rest = rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :]
    if program == "torchtitan.train":
        return _of_train(rest)
    if program in ("srun", "mpirun"):
        return problem_of(shlex.join(rest[rest.index("torchtitan") :]))
    if program == "torchtitan":
        return _problem_of_command(*rest)
    if program == "python" and rest[0].startswith("scripts/download_"):
        return _missing(rest[0]) or _problem_of_command("download", *rest[1:])
    if program == "./run_llama_train.sh":
        return _of_train(["--job.config_file", config, *rest])
    if program == "sbatch":
        at = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        missing = _missing(rest[at])
        return missing or _of_train(["--job.config_file", config, *rest[at + 1 :]])
    if program == "python" and rest[0].startswith("/"):  # a file that a page has saved
        return _missing(rest[0])
    if program == "python" and rest[0].startswith("scripts/"):
        return _missing(rest[0]) or _problem_of_options(ROOT / rest[0], rest[1:])
    if program in ("./run_tests.sh", ".ci/run"):
        named = [word for word in [program, *rest] if "/" in word and "=" not in word]
        return next(filter(None, map(_missing, named)), None)
    return _problem_of_outputs(rest) if program in FOREIGN else f"unknown program {program}"


def _problem_of_command(*words: str) -> str | None:
    """Of `torchtitan COMMAND ...`, by the parser of the command line."""
    try:
        options = parse(words)
        if options is None or vars(options).get("help"):
            return None
        if "settings" in options:
            settings = options.settings
            if options.command == "data" and not settings[0].endswith(".toml"):
                # The data themselves, or a run and a step.
                settings = settings[1 + (settings[1:2] != [] and settings[1].isdigit()) :]
            config = load_config(settings).config
            return _problem_of_data(config) if options.command == "train" else None
    except ValueError as error:
        return str(error)
    if options.command == "list" and (unknown := set(options.names) - set(lists())):
        return f"no such list: {unknown}"
    if words[:2] == ("config", "copy") and options.name not in shipped_configs():
        return f"no such config: {options.name}"
    if options.command != "convert":
        return None
    paths = [path for path in options.paths if path != "dcp-to-torch"]
    return _problem_of_outputs(paths[:1]) if len(paths) == 2 else "takes IN and OUT"


def _problem_of_data(config: JobConfig) -> str | None:
    """A run, and a check of one, need data to train on."""
    data = config.training.dataset != "auto" or config.training.dataset_path or config.data.sources
    return None if data else "names no data to train on"


def _of_train(arguments: list[str]) -> str | None:
    return _problem_of_command("train", *arguments)


def _problem_of_options(script: Path, words: list[str]) -> str | None:
    """Of a script of the clone: it has each option, and each file that is named is there."""
    source = script.read_text()
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--"):
            known = option[2:] in known_keys() if "." in option else f'"{option}"' in source
            if not known:
                return f"{script.name} has no {option}"
    return None


def _problem_of_outputs(words: list[str]) -> str | None:
    """Of a program that reads what a run wrote: some config of ours writes there."""
    folders = {f"outputs/{name}/" for name in shipped_configs()}
    inside = ("tb", "wandb", "comm_traces", "metrics.jsonl", "checkpoint")
    folders |= {f"outputs/{name}" for name in inside}  # of a config without job.dump_folder
    shown = "".join(text for page in PAGES for text in saved_files(page).values())
    folders |= {
        f"{folder}/" for folder in re.findall(r'^dump_folder = "(.+?)"', shown, re.MULTILINE)
    }
    for word in words:
        path = word.rpartition("=")[2].removeprefix("./")
        if path.startswith("outputs/") and not path.startswith(tuple(folders)):
            return f"no config writes {path}"
    return None


def _missing(name: str) -> str | None:
    return None if (ROOT / name.partition("::")[0]).exists() else f"{name} does not exist"


ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
COMMENTED = [
    *(ROOT / name for name in ("run_llama_train.sh", "run_tests.sh", "multinode_trainer.slurm")),
    *sorted((ROOT / "scripts").glob("*.py")),
    *sorted((ROOT / "train_configs").glob("*.toml")),
]


@pytest.mark.parametrize(
    ("page", "command"), ALL_COMMANDS, ids=lambda value: getattr(value, "name", value)
)
def test_command_works(page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for name, text in saved_files(page).items():
        (tmp_path / name).write_text(text)
        command = re.sub(rf"(?<!\S){re.escape(name)}(?!\S)", str(tmp_path / name), command)
    assert problem_of(command) is None


def test_commands_are_found_and_can_be_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert {"README.md", "launching.md"} <= {page.name for page, _ in ALL_COMMANDS}
    assert problem_of("NGPU=2 ./run_llama_train.sh --training.stepz 5")
    assert problem_of("CONFIG_FILE=train_configs/no.toml ./run_llama_train.sh")
    assert problem_of("torchrun --nproc_per_node 2 -m torchtitan.train --trainign.steps 5")
    assert problem_of("torchtitan train --model.flavor 8B --check") == "names no data to train on"
    assert problem_of("torchtitan tarin")
    assert problem_of("torchtitan download --repo_idd a/b")
    assert problem_of("python scripts/download_tokenizer.py --repo a/b")
    assert problem_of("python scripts/no_such.py")
    assert problem_of("python scripts/bench_memory.py --devise cuda")
    assert problem_of("torchtitan list model")
    assert problem_of("torchtitan config copy llama3_9b my.toml")
    assert problem_of("torchtitan config convert a.toml b.toml c.toml")
    assert problem_of("torchtitan config show train_configs/debug_model.toml --training.stepz 5")
    assert problem_of("torchtitan tokenize train_configs/debug_model.toml --workers 2")
    assert problem_of("torchtitan convert dcp-to-torch outputs/checkpoint/step-5")
    assert problem_of("torchtitan convert dcp-to-torch a b --dtype float8")
    assert problem_of("pip install wandb && torchtitan tarin")
    assert problem_of("tensorboard --logdir=./outputs/tensorboard")


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: path.name)
def test_commands_in_comments_work(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of these files begins with how it, or its run, is started."""
    monkeypatch.chdir(ROOT)
    found = commands_in_comments(path)
    assert found
    assert [(command, problem_of(command)) for command in found if problem_of(command)] == []


def test_commands_in_comments_are_found():
    debug = commands_in_comments(ROOT / "train_configs" / "debug_4d.toml")
    assert len(debug) == 2 and debug[1].endswith("--parallelism.pipeline_parallel_degree 1")
    (bench,) = commands_in_comments(ROOT / "scripts" / "bench_memory.py")
    assert bench == "python scripts/bench_memory.py --rounds 5 --steps 6 --device cpu"
    slurm, *_ = commands_in_comments(ROOT / "multinode_trainer.slurm")
    assert slurm.endswith("sbatch --nodes=32 multinode_trainer.slurm")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_blocks_are_configs(page: Path, tmp_path: Path):
    for text in blocks(page, "toml"):
        path = tmp_path / "block.toml"
        path.write_text(text)
        assert load_config([str(path)]).notices == (), "a block is in today's keys"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_import_what_is_there(page: Path):
    for text in blocks(page, "python"):
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_pages_have_blocks():
    for language, page in (("toml", "guides/memory.md"), ("python", "guides/own_model.md")):
        assert blocks(ROOT / "docs" / page, language)


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
        and not name.endswith((".py", ".toml", ".md", ".json", ".jsonl", ".damaged"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path):
    unknown = unknown_keys(page.read_text())
    if page.name == "from_torchtitan.md":  # the one page about older keys
        unknown = [name for name in unknown if not (name in OLD_KEYS or is_old_section(name))]
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


def test_the_tree_in_contributing_exists():
    block = re.search(
        r"^```text\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.M
    )
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
