"""`torchtitan download` with the real library, from a server that answers as the hub does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli_server import CliServer
from tests.unit.hub_server import COMMIT, Hub, Repository

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "tests" / "assets"
JSON = (ASSETS / "tokenizer" / "tokenizer.json").read_bytes()
CONFIG = (ASSETS / "tokenizer" / "tokenizer_config.json").read_bytes()
TIKTOKEN = (ASSETS / "test_tiktoken.model").read_bytes()
READER, STRANGER = "readersecret1234", "strangersecret1234"
REPOSITORIES = {
    "meta-llama/Meta-Llama-3-8B": Repository(
        {
            "README.md": b"",
            "config.json": b"{}",
            "model-00001-of-00002.safetensors": b"1",
            "model-00002-of-00002.safetensors": b"2",
            "model.safetensors.index.json": b"{}",
            "original/params.json": b"{}",
            "original/tokenizer.model": TIKTOKEN,
            "tokenizer.json": JSON,
            "tokenizer_config.json": CONFIG,
        },
        readers=(READER,),
    ),
    "mine/open": Repository({"tokenizer.json": JSON, "tokenizer_config.json": CONFIG}),
    "mine/nested": Repository({"original/tokenizer.model": TIKTOKEN, "weights.bin": b""}),
    "mine/weights": Repository({"model.safetensors": b"", "vocab.txt": b""}),
    "mine/similar": Repository({"my_tokenizer.json": b"{}", "old/other_tokenizer.model": b""}),
}
LLAMA = "--repo_id=meta-llama/Meta-Llama-3-8B"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(REPOSITORIES, tokens=(READER, STRANGER)) as server:
        yield server


def variables(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a machine where nobody has logged in."""
    own = {"HF_HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**inherited, "PYTHONPATH": str(ROOT), **own, **more}


@pytest.fixture(scope="module")
def cli(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliServer]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        for name, value in variables(home, HF_ENDPOINT=hub.url).items():
            patch.setenv(name, value)
        server = CliServer("--without-torch")
    yield server
    server.close()


def program(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=variables(cwd / "home", **environment),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_meta_s_original_file(cli: CliServer, hub: Hub, tmp_path: Path):
    arguments = [LLAMA, "--tokenizer_path=original", f"--local_dir={tmp_path}"]
    result = cli.run("download", *arguments, HF_TOKEN=READER)
    assert result.status == 0, result.stderr
    assert (tmp_path / "original" / "tokenizer.model").read_bytes() == TIKTOKEN
    assert f"wrote {tmp_path}/original/tokenizer.model" in result.stdout
    assert f'2,256 tokens; set model.tokenizer_path = "{tmp_path}/original"' in result.stdout
    assert not (tmp_path / "tokenizer.json").exists()
    assert READER in {token for _, token in hub.sent}


def test_all_that_belongs_to_a_tokenizer_json(cli: CliServer, tmp_path: Path):
    result = cli.run("download", "--repo_id=mine/open", f"--local_dir={tmp_path}")
    assert result.status == 0, result.stderr
    assert (tmp_path / "tokenizer.json").read_bytes() == JSON
    assert (tmp_path / "tokenizer_config.json").read_bytes() == CONFIG
    assert f'2,011 tokens; set model.tokenizer_path = "{tmp_path}"' in result.stdout


def test_a_file_and_a_commit_may_be_named(cli: CliServer, tmp_path: Path):
    arguments = ["--tokenizer_path=original/tokenizer.model", f"--revision={COMMIT}"]
    arguments += ["--repo_id=mine/nested", f"--local_dir={tmp_path}"]
    assert cli.run("download", *arguments).status == 0
    assert (tmp_path / "original" / "tokenizer.model").read_bytes() == TIKTOKEN


def test_the_words_of_torchtune(cli: CliServer, tmp_path: Path):
    for words in (["mine/open", "--output-dir"], ["--revision=main", "mine/open", "--output-dir"]):
        folder = tmp_path / str(len(words))
        assert cli.run("download", *words, str(folder)).status == 0
        assert (folder / "tokenizer.json").read_bytes() == JSON


def test_kinds_of_files(cli: CliServer, tmp_path: Path):
    kinds = ["tokenizer", "config", "index", "safetensors"]
    arguments = [LLAMA, f"--local_dir={tmp_path}", "--assets", *kinds]
    assert cli.run("download", *arguments, HF_TOKEN=READER).status == 0
    folder = tmp_path / "Meta-Llama-3-8B"
    found = {file.name for file in folder.iterdir() if file.is_file()}
    expected = {name for name in REPOSITORIES[LLAMA[10:]].files if "/" not in name}
    assert found == expected - {"README.md"}
    result = cli.run("download", "--repo_id=mine/open", "--assets=index")
    assert "has no index; looked for *.safetensors.index.json" in result.stderr


REFUSED = {
    "no-token": ([LLAMA], {}, ["is gated, and there is no token", "hf auth login"]),
    "no-access": (
        [LLAMA],
        {"HF_TOKEN": STRANGER},
        ["is gated, and the token's owner has no access", "wait until it is granted"],
    ),
    "bad-token": (
        ["--repo_id=mine/open"],
        {"HF_TOKEN": "expiredsecret1234"},
        ["the hub does not accept the token"],
    ),
    "no-repository": (
        ["--repo_id=mine/absent"],
        {},
        ["does not exist, or is private", "check the spelling; if it is private, set HF_TOKEN"],
    ),
    "no-repository-with-token": (
        ["--repo_id=mine/absent"],
        {"HF_TOKEN": READER},
        ["does not exist, or is private", "check the spelling."],
    ),
    "no-name": (["--repo_id=a/b/c"], {}, ["is not a repository name", "OWNER/NAME"]),
    "revision": (
        ["--repo_id=mine/open", "--revision=v9"],
        {},
        ['--revision = "v9": mine/open has no branch, tag or commit of this name'],
    ),
    "no-tokenizer": (
        ["--repo_id=mine/weights"],
        {},
        ["has no tokenizer there; looked for tokenizer.json, tokenizer.model"],
    ),
    "no-tokenizer-but-similar-names": (
        ["--repo_id=mine/similar"],
        {},
        ["has no tokenizer there", "use the repository of another form of the model"],
    ),
    "tokenizer-elsewhere": (
        ["--repo_id=mine/nested"],
        {},
        ["it has original/tokenizer.model: name the folder of one by --tokenizer_path"],
    ),
    "tokenizer-not-in-there": (
        ["--repo_id=mine/open", "--tokenizer_path=original"],
        {},
        [
            "looked for original/tokenizer.json, original/tokenizer.model",
            "it has tokenizer.json: name the folder of one",
        ],
    ),
    "no-folder": (
        ["--repo_id=mine/open", "--local_dir=/dev/null/below"],
        {},
        ["--local_dir: cannot be written: Not a directory"],
    ),
    "both": (
        ["--repo_id=a/b", "--assets=config", "--tokenizer_path=x"],
        {},
        ["takes --assets or --tokenizer_path, not both"],
    ),
    "kind": (["--repo_id=a/b", "--assets=wieghts"], {}, ["argument --assets: invalid choice"]),
    "nothing": ([], {}, ["one of the arguments OWNER/NAME --repo_id is required"]),
    "two-names": (["a/b", "--repo_id=c/d"], {}, ["not allowed with argument OWNER/NAME"]),
}


@pytest.mark.parametrize(("arguments", "environment", "texts"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_told_apart(cli: CliServer, arguments, environment, texts, tmp_path):
    if not any(argument.startswith("--local_dir") for argument in arguments):
        arguments = [*arguments, f"--local_dir={tmp_path}"]
    result = cli.run("download", *arguments, **environment)
    assert result.status == 2 and "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr
    assert list(tmp_path.rglob("*.json")) == []
    assert not any(secret in result.stderr for secret in environment.values())


def test_the_hub_in_trouble(cli: CliServer, hub: Hub):
    hub.broken = True
    try:
        result = cli.run("download", "--repo_id=mine/open")
    finally:
        hub.broken = False
    assert result.status == 2 and "the hub answered with status 500" in result.stderr


def test_without_a_network(tmp_path: Path):
    arguments = ["-m", "torchtitan.cli", "download", "--repo_id=mine/open"]
    nowhere = program(*arguments, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert nowhere.returncode == 2 and "Traceback" not in nowhere.stderr
    assert "http://127.0.0.1:9 cannot be reached: " in nowhere.stderr
    offline = program(*arguments, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE: is set, which forbids downloads" in offline.stderr


@pytest.mark.parametrize(
    "script", ["scripts/download_tokenizer.py", "torchtitan/datasets/download_tokenizer.py"]
)
def test_the_scripts_and_a_token_on_the_command_line(hub: Hub, tmp_path: Path, script: str):
    arguments = [LLAMA, "--tokenizer_path=original", f"--hf_token={READER}"]
    result = program(str(ROOT / script), *arguments, cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "torchtitan" / "datasets" / "tokenizer"
    assert (folder / "original" / "tokenizer.model").read_bytes() == TIKTOKEN
    assert "other users of this machine can see --hf_token" in result.stderr
    assert READER not in result.stdout + result.stderr
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(READER.encode() in file.read_bytes() for file in kept)
    # It was for that time only.
    (folder / "original" / "tokenizer.model").unlink()
    again = program(str(ROOT / script), *arguments[:2], cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert "is gated, and there is no token" in again.stderr


def test_the_newer_script(hub: Hub, tmp_path: Path):
    script = str(ROOT / "scripts" / "download_hf_assets.py")
    result = program(script, "--repo_id=mine/open", cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "assets" / "hf" / "open" / "tokenizer.json").read_bytes() == JSON


@pytest.mark.parametrize("bad", ["--hf-tokn", "--hf_token"])
def test_a_token_in_a_mistaken_command_is_not_repeated(cli: CliServer, bad: str):
    values = [bad, "abcsecret\n1234", f"{bad}x=abcsecret\n1234"]
    result = cli.run("download", "--repo_id=mine/open", *values)
    assert result.status == 2 and "abcsecret" not in result.stderr
    result = cli.run("download", "--repo_id=mine/open", f"{bad}=abcsecret\n1234")
    assert result.status == 2 and "abcsecret" not in result.stderr
    result = cli.run("download", "--repo_id=mine/open", HF_TOKEN="abcsecret\n1234")
    assert result.status == 2 and "abcsecret" not in result.stderr
