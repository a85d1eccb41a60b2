"""The command as users start it: exit statuses, what is printed where, and no torch before need."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_server import ROOT, CliServer

import torchtitan
from tests.forked import execute, launcher_variables
from torchtitan import cli as command_line
from torchtitan.config.toml_file import tomllib

GOOD = ["--training.dataset=stdlib", "--training.seq_len=256"]


@pytest.fixture(scope="module")
def torchless() -> Iterator[CliServer]:
    """Where importing torch fails."""
    server = CliServer("--without-torch")
    yield server
    server.close()


@pytest.fixture(scope="module")
def cli() -> Iterator[CliServer]:
    server = CliServer()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "usage: torchtitan [-h]"),
        (["--help"], "train from a TOML"),
        (["help"], "train from a TOML"),
        (["--version"], torchtitan.__version__),
        (["version"], torchtitan.__version__),
        (["help", "train"], "Sections:"),
        (["train", "--help"], "Sections:"),
        (["train", "--help", "all"], "--training.seq_len"),
        (["train", "--help", "handlers.lora"], "--handlers.lora.rank"),
        (["help", "config", "copy"], "usage: torchtitan config copy"),
        (["completion", "bash"], "complete -o bashdefault"),
        (["config", "show", "llama3_8b"], 'flavor = "8B"'),
        (["config"], "usage: torchtitan config"),
        (["config", "schema"], '"title": "torchtitan run"'),
        (["config", "docs"], "# Every setting"),
        (["config", "show", "--training.steps=5"], "# command line"),
        (["list", "models"], "llama3"),
        (["list", "datasets"], "stdlib"),
        (["list", "handlers"], "compile"),
        (["list", "tokenizers"], "tokenizer.model"),
        (["list", "optimizers"], "settings: momentum, nesterov"),
        (["list", "schedules"], "warmup_stable_decay"),
        (["list", "sinks"], "metrics.enable_wandb"),
        (["list", "losses"], "settings: z_loss_weight, label_smoothing"),
        (["list", "configs"], "debug_model"),
        (["doctor", "--help"], "usage: torchtitan doctor"),
        (["list"], "datasets:"),
        (["list", "--help"], "usage: torchtitan list"),
        (["list", "models", "--help"], "usage: torchtitan list"),
        (["config", "copy", "--help"], "usage: torchtitan config"),
        (["config", "show", "-h"], "usage: torchtitan config"),
        (["convert", "dcp-to-torch", "--help"], "usage: torchtitan convert"),
        (["download", "--help"], "--repo_id"),
        (["tokenize", "--help"], "--output DIR"),
    ],
)
def test_words_work_without_torch(torchless: CliServer, arguments: list[str], expected: str):
    result = torchless.run(*arguments)
    assert (result.status, result.stderr) == (0, "")
    assert expected in result.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["trian"], {}, 'did you mean "train"?'),
        (["config", "shwo"], {}, 'did you mean "show"?'),
        (["config", "schema", "x"], {}, "takes no more arguments"),
        (["list", "modles"], {}, 'did you mean "models"?'),
        (["train", "no_such.toml"], {}, "does not exist"),
        (["train", "llama3_8"], {}, "did you mean `llama3_8b`, which comes with the library?"),
        (["tokenize", "debug_modle", "--output=x"], {}, "did you mean `debug_model`"),
        (["config", "show", "mistral"], {}, "`torchtitan list configs` prints the names"),
        (["train", "--training.stepz=1"], {}, "did you mean `--training.steps`?"),
        (["train", "--check=half"], {}, "does not exist"),
        (["train", *GOOD], {"WORLD_SIZE": "two"}, "WORLD_SIZE = two: is not an integer"),
        (["train", *GOOD], {"WORLD_SIZE": "2"}, "launch with torchrun"),
        (["train", *GOOD], {"WORLD_SIZE": "2", "RANK": "2"}, "MASTER_ADDR: is missing"),
        (["train", *GOOD, "--check"], {"WORLD_SIZE": "x"}, "WORLD_SIZE = x"),
        (["train", *GOOD, "--data.lanes=3"], {}, "data.lanes = 3"),
        (["train", *GOOD, "--model.flavor=9B"], {}, "model.flavor"),
        (["train", *GOOD, "--loss.args.z_loss=1e-4"], {}, "z_loss_weight"),
        (["train", "--data.sources=[{weight = 1.0}]"], {}, "data.sources[0].path"),
        (["tokenize", "--output=x"], {}, 'dataset "auto" needs it'),
        (["tokenize", *GOOD, "--workers=2"], {}, "arguments are required: --output"),
    ],
)
def test_config_errors_are_told_without_torch(
    torchless: CliServer, arguments: list[str], environment: dict[str, str], expected: str
):
    result = torchless.run(*arguments, **environment)
    assert result.status == 2
    assert result.stdout == ""
    assert expected in result.stderr
    assert "nothing was started" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("launcher", [{"TORCHELASTIC_RUN_ID": "none"}, {}])
def test_a_rank_that_rank_0_does_not_answer_tells_itself(
    launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Under torchrun rank 0 would tell for all."""
    for name, value in (launcher_variables(2)[1] | launcher).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command_line, "_PATIENCE_SECONDS", 0.5)
    assert command_line.main(["train", "--training.steps=0"]) == 2
    assert capsys.readouterr().err.count("error: training.steps = 0") == 1


@pytest.mark.parametrize(
    ("words", "check", "settings"),
    [
        ("run.toml --check", "plain", ["run.toml"]),
        ("--check run.toml", "plain", ["run.toml"]),
        ("--check full run.toml", "full", ["run.toml"]),
        ("--check=full run.toml", "full", ["run.toml"]),
        ("--check --debug.seed 3", "plain", ["--debug.seed", "3"]),
        ("--job.description -hello", "", ["--job.description", "-hello"]),
        ("--job.sinks a b --check full x", "full", ["x", "--job.sinks", "a", "b"]),
        ("--checkpoint.enable run.toml", "", ["--checkpoint.enable", "run.toml"]),
        ("--checkpoint.load_step -1 --optimizer.lr=-1e-3", "", None),
    ],
)
def test_a_check_leaves_the_settings_alone(words: str, check: str, settings: list[str] | None):
    options = command_line.parse(["train", *words.split()])
    assert options and options.check == check
    assert options.settings == (words.split() if settings is None else settings)


def test_problems_of_a_run_folder_are_found_without_torch(torchless: CliServer, tmp_path: Path):
    (tmp_path / "file").touch()
    result = torchless.run("train", *GOOD, f"--job.dump_folder={tmp_path / 'file'}")
    assert result.status == 2
    assert "job.dump_folder" in result.stderr


@pytest.mark.parametrize("words", [["config", "schema"], ["train", "--help"], ["--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_leaves_is_no_error(words: list[str], unbuffered: str):
    """As in `torchtitan config show run.toml | head -3`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "torchtitan.cli", *words]
    result = subprocess.run(
        command,
        stdout=write,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        text=True,
        cwd=ROOT,
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_other_run_in_the_folder_is_told_with_everything_else(
    torchless: CliServer, cli: CliServer, tmp_path: Path
):
    """By a start, before torch is imported, as by a check."""
    stored = ["--training.seq_len=128", "--training.global_batch_size=4", "--data.lanes=4"]
    shown = torchless.run("config", "show", "--training.dataset=stdlib", *stored)
    (tmp_path / "config.toml").write_text(shown.stdout)
    (tmp_path / "run_status.json").write_text('{"status": "failed", "step": 3, "run_id": "a"}')
    folder = f"--job.dump_folder={tmp_path}"
    for server, check in ((torchless, []), (cli, ["--check", "full"])):
        other = ["--training.dataset_path=/no/such.jsonl", "--training.seq_len=256"]
        result = server.run("train", *other, folder, *check)
        assert result.status == 2
        assert "training.seq_len = 256: is 128 in the run" in result.stderr
        assert "training.dataset_path" in result.stderr
        anew = server.run("train", *other, folder, "--job.new_run", *check)
        assert anew.status == 2 and "training.seq_len" not in anew.stderr
    # The stored batch of 4 is that of the run, and cannot be shared by 3 processes.
    same = ["train", "--training.dataset=stdlib", "--training.seq_len=128", folder, "--check"]
    result = cli.run(*same, WORLD_SIZE="3")
    assert result.status == 2
    assert "training.global_batch_size = 4" in result.stderr


@pytest.mark.parametrize("world_size", [1, 6])
def test_check_prints_the_resolved_run(cli: CliServer, world_size: int):
    replicate = "--parallelism.data_parallel_replicate_degree=3" if world_size == 6 else ""
    arguments = [*GOOD, "--training.local_batch_size=2", "--training.global_batch_size=24"]
    result = cli.run(
        *["train", "--check", *arguments, *filter(None, [replicate])],
        WORLD_SIZE=str(world_size),
    )
    assert result.status == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("ok: llama3 debugmodel on ")
    mesh = "1 (replicate) x 1 (shard)" if world_size == 1 else "3 (replicate) x 2 (shard)"
    assert mesh in line
    assert "24 sequences x 256 = 6,144 tokens a step" in line
    assert f" a step, {12 // world_size} microbatches of 2 a rank; 24 lanes" in line


def test_a_check_by_several_ranks_is_told_once(cli: CliServer):
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    result = cli.run("train", "--check", *GOOD, **launched)
    assert (result.status, result.stdout, result.stderr) == (0, "", "")


def test_check_takes_absent_files_for_warnings_and_full_check_does_not(cli: CliServer):
    arguments = ["train", "--training.dataset_path=/no/such.jsonl", "--training.seq_len=256"]
    plain = cli.run(*arguments, "--check")
    assert plain.status == 9, "it may be on the machine that trains, but it was not checked"
    assert "warning: training.dataset_path" in plain.stderr
    assert plain.stdout.startswith("not found here, so not checked: training.dataset_path; else ok")
    full = cli.run(*arguments, "--check", "full")
    assert full.status == 2
    assert "error: training.dataset_path" in full.stderr


def test_full_check_looks_at_the_hardware(cli: CliServer):
    arguments = ["train", *GOOD, "--job.device=cuda"]
    assert cli.run(*arguments, "--check").status == 0
    full = execute(
        [sys.executable, "-m", "torchtitan", *arguments, "--check=full"],
        env={"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
    )
    assert full.returncode == 2
    assert 'job.device = "cuda": no CUDA device can be used' in full.stderr


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("", "no_such_module", 'no module is named "no_such_module"'),
        ("", "own_empty.missing", 'no module is named "own_empty'),
        ("", "./own.py", "is not the dotted name of a module. Fix: write own, and add the folder"),
        ("", "own.py", "is not the dotted name of a module. Fix: write own, and add the folder"),
        ("", "own/models", "Fix: write it as in an import statement, such as my_project.models"),
        ("import no_such_dependency", "own_broken", "No module named 'no_such_dependency'"),
        ("1 / 0", "own_raising", "ZeroDivisionError: division by zero. Fix: correct the module."),
    ],
)
def test_custom_import_that_fails(
    torchless: CliServer, tmp_path: Path, source: str, name: str, expected: str
):
    if name.startswith("own"):
        (tmp_path / f"{re.split(r'[./]', name)[0]}.py").write_text(source)
    result = torchless.run(
        *["train", *GOOD, f"--job.custom_import={name}"],
        search=tmp_path,
    )
    assert result.status == 2
    assert "job.custom_import" in result.stderr
    assert expected in result.stderr
    assert "importlib" not in result.stderr, "frames that led to the module"


def test_custom_import_registers_before_the_check_and_says_so(cli: CliServer, tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "from torchtitan.data.registry import register_dataset, datasets\n"
        "register_dataset('own', datasets()['stdlib'].factory)\n"
    )
    result = cli.run(
        *["train", "--training.dataset=own", "--training.seq_len=256", "--check"],
        "--job.custom_import=own",
        search=tmp_path,
    )
    assert result.status == 0, result.stderr
    assert f"imported own from {tmp_path / 'own.py'} (sha256 " in result.stderr


def test_current_folder_is_not_searched_for_custom_imports(tmp_path: Path):
    """Started as the installed command is: by a script that lies elsewhere."""
    (tmp_path / "sneaky.py").write_text("raise SystemExit('ran')")
    program = "import sys; sys.path.remove(''); import torchtitan.cli as cli; sys.exit(cli.main())"
    arguments = ["train", *GOOD, "--job.custom_import=sneaky"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert 'no module is named "sneaky"' in result.stderr


def test_schema_is_json(torchless: CliServer):
    assert json.loads(torchless.run("config", "schema").stdout)["type"] == "object"


def test_doctor_names_what_is_there(cli: CliServer):
    result = cli.run("doctor", "--quick")
    assert result.status == 0, result.stdout
    for word in ("python", "torch:", "gloo", "GPU", "run folder"):
        assert word in result.stdout


def test_doctor_finds_a_broken_torch(torchless: CliServer):
    result = torchless.run("doctor")
    assert result.status == 1
    assert "WRONG  torch: cannot be imported" in result.stdout


def test_a_flag_of_the_list_may_have_dashes(torchless: CliServer):
    done = torchless.run("list", "masks", "--job.custom-import", "no_such_module")
    assert 'no module is named "no_such_module"' in done.stderr


ASCII = """
import sys
from torchtitan.cli import main

sys.stdout.reconfigure(encoding="ascii")
sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")
sys.exit(main())
"""
"""As PYTHONIOENCODING has it, in a process that is forked because the command imports torch."""


@pytest.mark.parametrize(
    "words",
    [
        ["config", "show"],
        ["train", "--check", "--job.print_config"],
        ["list", "configs"],
        ["doctor", "--quick"],
    ],
)
def test_what_a_terminal_cannot_print_is_escaped(words: list[str], tmp_path: Path):
    """Also where it is printed as an error, and of arguments that are no text in any encoding."""
    (tmp_path / "bün.toml").write_text('[job]\ndescription = "Grüße 🙂"\n[trainign]\n')
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}

    def run(*arguments: str | bytes) -> subprocess.CompletedProcess[str]:
        if words[0] in ("train", "doctor"):
            return execute([sys.executable, "-c", ASCII, *words, *arguments], environment, ROOT)
        command = [sys.executable, "-m", "torchtitan.cli", *words, *arguments]
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    if words[0] in ("config", "train"):
        refused = run(str(tmp_path / "bün.toml"))
        assert refused.returncode == 2 and "trainign" in refused.stderr
        assert "Traceback" not in refused.stderr
    (tmp_path / "bün.toml").write_text('[job]\ndescription = "Grüße 🙂"\n')
    flags = [] if words[0] == "list" else [str(tmp_path / "bün.toml"), *GOOD]
    done = run(*flags, *([b"--job.dump_folder=/tmp/\xff"] if words[0] == "config" else []))
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1), done.stderr
    if words[0] == "config":
        assert r'"Gr\u00fc\u00dfe \U0001f642"' in done.stdout
        assert (
            tomllib.loads(done.stdout.replace(r"\udcff", "?"))["job"]["description"] == "Grüße 🙂"
        )
