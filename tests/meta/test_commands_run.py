"""The commands in README and docs run: trainings for two steps, large ones as `--check`.

`test_docs.py` reads the same commands. Pages whose commands build on each other have a test of
their own. Commands that need a network, a cluster, a terminal or half an hour are listed with the
reason.
"""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.forked import execute
from tests.meta.test_docs import PAGES, ROOT, commands

OWN_TESTS = {
    "docs/start/quickstart.md": "distributed/test_quickstart_page.py",
    "docs/start/finetuning.md": "distributed/test_finetuning_page.py",
    "docs/start/pretrained.md": "distributed/test_pretrained_page.py",
    "docs/guides/own_handler.md": "distributed/test_own_handler.py",
    "docs/examples/titan_extras/README.md": "meta/test_extending.py",
}
PYTEST = r"\./run_tests\.sh|pytest|\.ci/run|python -m pytest"
MINUTES = r"python scripts/(bench_|make_converging|make_low_precision|soak|make_parity)"
NETWORK = r"pip |pre-commit|PIP_EXTRA|torchtitan (download|upload)|wandb|python scripts/download"
OTHERS = (
    r"ssh|tensorboard|mkdocs|mkdir|kill|tail|jq|touch|cd|ls|source|export|python -m (torch\.|venv)"
)
NOT_RUN = {
    PYTEST: "runs the tests",
    MINUTES: "takes minutes",
    NETWORK: "needs a network",
    OTHERS: "is another program's",
    r"python scripts/make_smollm2": "is what the fixture smollm2 runs",
    r"hf |git |.*--tasks (arc|gsm8k)|.*--tasks mmlu": "needs data of a hub",
    r"torchtitan chat": "needs a terminal",
    r"WANDB_": "needs an account",
    r".*enable_memory_snapshot": "needs a GPU",
    r"torchrun \.\.\.|.*/shared/|.*\.\./old": "stands for somebody's cluster or environment",
}
NIGHTLY = r"torchtitan (bisect|replay)"  # fresh processes; their own tests run the same by day
SHORT = ["--training.steps", "2", "--job.new_run", "--job.dump_folder", "outputs/short"]
SHORT += ["--lr_scheduler.warmup_steps", "1", "--lr_scheduler.decay_ratio", "0.5"]
VALIDATED = ["--validation.enable", "--validation.dataset=stdlib", "--validation.steps=1"]
STEPS = {"20": "4", "40": "3", "500": "4", "900": "7", "1000": "8", "1230": "7"}
"""Steps that the pages name, and those of the small runs that stand in for outputs/mine."""


def cases() -> list[str]:
    found = []
    for page in PAGES:
        own = page.relative_to(ROOT).as_posix() in OWN_TESTS
        words = [shlex.split(line.partition(" > ")[0], comments=True) for line in commands(page)]
        plain = [shlex.join(each) for each in words if each]
        found += [c for c in plain if not own and not any(re.match(p, c) for p in NOT_RUN)]
    return list(dict.fromkeys(found))


CASES = cases()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, small_smollm2: Path) -> Path:
    """A folder that stands in for a clone, with the runs and files that pages speak of."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("docs", "scripts", "tests", "train_configs", "torchtitan"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "smollm2").symlink_to(small_smollm2)
    (folder / "my_tasks").symlink_to(ROOT / "docs" / "examples" / "tasks")
    (folder / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    words = f'[model]\ntokenizer_path = "{small_smollm2}"\n'  # outputs/mine has that vocabulary
    (folder / "llama.toml").write_text(words + runs.CONFIG)
    outputs = folder / "outputs"
    outputs.mkdir()
    for name in ("mine", "debug_model"):
        words = ["-m", "torchtitan.train", "llama.toml", f"--job.dump_folder=outputs/{name}"]
        run(folder, [*words, "--training.steps=8", "--debug.record=1", "--data.ledger", *VALIDATED])
    base = f"--checkpoint.initial_load_path={small_smollm2}"
    lora = ["--model.handlers=lora", "--model.flavor=from_checkpoint", base]
    (folder / "lora.toml").write_text(runs.CONFIG[runs.CONFIG.index("[training]") :])
    words = ["-m", "torchtitan.train", "lora.toml", *lora, *SHORT]
    run(folder, [*words, "--job.dump_folder=outputs/lora"])
    run(folder, ["-m", "torchtitan", "export", "outputs/mine", "outputs/hf"])
    (outputs / "checkpoint").symlink_to(outputs / "mine" / "checkpoint")
    (folder / "runs").mkdir()
    for name in ("tp2", "fsdp4"):
        (folder / "runs" / name).symlink_to(outputs / "mine")
    return folder


def run(folder: Path, words: list[str], more: dict[str, str] | None = None) -> None:
    """Run a command in the folder, to its end. A check may miss files: status 9."""
    env = runs.environment() | (more or {})
    done = execute([sys.executable, *words], env, folder, timeout=240)
    accepted = (0, 9) if "--check" in words else (0,)
    assert done.returncode in accepted, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.nightly] * bool(re.match(NIGHTLY, command)))
        for command in CASES
    ],
)
def test_command_runs(command: str, clone: Path):
    words, env = prepare(command, clone)
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], cwd=clone, check=True, capture_output=True)
    else:
        run(clone, words, env)


def prepare(command: str, clone: Path) -> tuple[list[str], dict[str, str]]:
    """Return the words after `python`, and the environment, of a command."""
    words, env = shlex.split(command), dict[str, str]()
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    words = [moved(word, clone) for word in words]
    program, *rest = words
    if program == "python" and rest[0] != "-m":
        return words, env
    processes, rest = launched(program, rest, env)
    if rest[0] != "torchtitan.train" and rest[:2] != ["torchtitan", "train"]:
        fresh = ["--job.dump_folder", "outputs/other"] if "doctor" in rest and len(rest) > 2 else []
        return [*launcher(processes), "-m", *rest, *fresh], env
    if {"--check", "fake_backend"} & set(rest):
        return ["-m", *rest, "--job.dump_folder", "outputs/other"], env
    if any("debug_" in word or "docs/examples" in word for word in rest):
        return [*launcher(processes), "-m", *rest, *SHORT], env
    return ["-m", *rest, "--check"], env | {"WORLD_SIZE": str(processes)}


def launched(program: str, rest: list[str], env: dict[str, str]) -> tuple[int, list[str]]:
    """Return the number of processes, and the words from the module's name on."""
    if program in ("./run_llama_train.sh", "sbatch"):
        config = env.pop("CONFIG_FILE", "train_configs/debug_model.toml")
        nodes = sum(int(word.partition("=")[2]) for word in rest if word.startswith("--nodes="))
        if program == "sbatch":
            rest = rest[rest.index("multinode_trainer.slurm") + 1 :]
        count = 8 * max(nodes, 1) if program == "sbatch" else int(env.pop("NGPU", "1"))
        return count, ["torchtitan.train", "--job.config_file", config, *rest]
    if program == "torchtitan":
        return 1, [program, *rest]
    at = rest.index("-m") + 1 if "-m" in rest else rest.index("torchtitan")
    sizes = [int(size) for size in rest[:at] if size.isdigit()]  # of nodes, of processes on each
    return math.prod(sizes[:2]), rest[at:]


def launcher(processes: int) -> list[str]:
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return several if processes > 1 else []


def moved(word: str, clone: Path) -> str:
    """Return a word with a step of the small run for one of a page, and a path in the folder."""
    word = word.replace("/tmp/", f"{clone}/new-")
    named = r"(?<=step-)\d+\b|(?<=--step )\d+|^(?:20|40|500|900|1000|1230)$"
    return re.sub(named, lambda found: STEPS.get(found[0], found[0]), word)


def test_each_command_that_is_not_run_has_a_reason():
    everything = {command for page in PAGES for command in commands(page)}
    assert [p for p in NOT_RUN if not any(re.match(p, command) for command in everything)] == []
    for page, test in OWN_TESTS.items():
        assert (ROOT / page).exists() and (ROOT / "tests" / test).exists()
