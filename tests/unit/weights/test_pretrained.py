"""Starting from a checkpoint: its hyper-parameters and tokenizer, from a folder or the hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli_server import CliServer, Result
from tests.unit.commands.test_download import variables
from tests.unit.hub_server import COMMIT, Hub, Repository

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "tests" / "assets" / "tokenizer"
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
}
CONFIG = json.dumps(SIZES).encode()
FILES = {
    "config.json": CONFIG,
    "tokenizer.json": (TOKENIZER / "tokenizer.json").read_bytes(),
    "tokenizer_config.json": (TOKENIZER / "tokenizer_config.json").read_bytes(),
    "model.safetensors": b"0" * 100_000,
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"the same again",
    "original/consolidated.00.pth": b"the same again",
}
READER = "readersecret1234"
SHARDED = {
    **FILES,
    "model-00001-of-00002.safetensors": b"1",
    "model-00002-of-00002.safetensors": b"2",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {x: f"model-0000{x}-of-00002.safetensors" for x in "12"}}
    ).encode(),
}
SHARDED.pop("model.safetensors")
REPOSITORIES = {
    "mine/small": Repository(FILES),
    "mine/sharded": Repository(SHARDED),
    "mine/gated": Repository(FILES, readers=(READER,)),
    "mine/pickled": Repository({"config.json": CONFIG, "pytorch_model.bin": b""}),
    "mine/quantised": Repository({"model.Q4.gguf": b""}),
}
FROM = ("--model.flavor", "from_checkpoint", "--checkpoint.enable", "--training.dataset", "stdlib")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(REPOSITORIES, tokens=(READER,)) as server:
        yield server


@pytest.fixture(scope="module")
def cli() -> Iterator[CliServer]:
    server = CliServer("--without-torch")
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(TOKENIZER, path)
    (path / "config.json").write_bytes(CONFIG)
    return path


def show(cli: CliServer, *settings: str, **environment: str) -> Result:
    return cli.run("config", "show", *FROM, *settings, **environment)


def show_load(cli: CliServer, path: Path | str, *settings: str, **environment: str) -> Result:
    return show(cli, "--checkpoint.initial_load_path", str(path), *settings, **environment)


def lines(result: Result) -> dict[str, str]:
    """The values that are shown, and where each is from."""
    rows = [line.partition(" = ") for line in result.stdout.splitlines() if " = " in line]
    return {key: " ".join(rest.split()) for key, _, rest in rows}


def test_a_folder(cli, folder):
    result = show_load(cli, folder, "--model.args.n_layers", "3")
    assert result.status == 0, result.stderr
    shown, source = lines(result), f"# {folder / 'config.json'}"
    assert shown["dim"] == f"64 {source}"
    assert shown["rope_theta"] == f"20000.0 {source}"
    assert shown["n_layers"] == "3 # command line"
    assert shown["tokenizer_path"] == f'"{folder}" # {folder}'
    assert shown["flavor"].startswith('"from_checkpoint"')


def test_what_the_user_says_wins(cli, folder):
    result = show_load(cli, folder, "--model.tokenizer_path", "bytes", "--model.name", "llama2")
    shown = lines(result)
    assert shown["tokenizer_path"].startswith('"bytes" # command line')
    assert 'name = "llama2"' in result.stdout


def test_another_family_is_refused(cli, folder):
    result = show_load(cli, folder, "--model.name", "qwen3")
    assert result.status == 2
    assert 'model.name = "qwen3": the model in' in result.stderr


def test_without_a_checkpoint(cli):
    result = cli.run("train", *FROM, "--check")
    assert result.status == 2
    assert 'model.flavor = "from_checkpoint": needs a checkpoint' in result.stderr


def test_a_folder_without_a_tokenizer(cli, folder):
    (folder / "tokenizer.json").unlink()
    result = show_load(cli, folder)
    assert result.status == 2
    assert "model.tokenizer_path: is unset, and" in result.stderr
    assert show_load(cli, folder, "--model.tokenizer_path", "bytes").status == 0


def hub_variables(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    return {**variables(home, HF_ENDPOINT=hub.url), "HF_HUB_OFFLINE": "", "HF_TOKEN": "", **more}


def download(hub: Hub, home: Path, *paths: str, **more: str) -> Result:
    """In a process of its own: the library reads its environment once."""
    server = CliServer("--without-torch")
    try:
        for path in paths:
            result = show_load(server, path, **hub_variables(hub, home, **more))
    finally:
        server.close()
    return result


def test_the_hub_is_asked_for_the_small_files_only(hub, tmp_path):
    result = download(hub, tmp_path, f"hf://mine/small@{COMMIT}")
    assert result.status == 0, result.stderr
    shown = lines(result)
    snapshot = tmp_path / "hub" / "models--mine--small" / "snapshots" / COMMIT
    assert shown["dim"] == f"64 # {snapshot / 'config.json'}"
    assert shown["initial_load_path"].startswith(f'"hf://mine/small@{COMMIT}"')
    names = {path.name for path in snapshot.iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def fetch(hub: Hub, home: Path, code: str, **more: str) -> Result:
    """Python with the module `hub`, in a process of its own."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", f"from torchtitan.weights import hub\n{code}"],
        env={**hub_variables(hub, home), **more},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_weights_once_and_only_those(hub, tmp_path):
    first = fetch(hub, tmp_path, "print(hub.download('hf://mine/small'))")
    assert first.status == 0, first.stderr
    snapshot = Path(first.stdout.strip())
    assert (snapshot / "model.safetensors").stat().st_size == 100_000
    assert not {"consolidated.safetensors", "pytorch_model.bin", "original"} & {
        path.name for path in snapshot.iterdir()
    }
    assert "downloading hf://mine/small: 4 files" in first.stderr
    # Offline, the cache serves it.
    again = fetch(hub, tmp_path, "print(hub.download('hf://mine/small'))", HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout
    other = fetch(hub, tmp_path, "hub.download('hf://mine/sharded')", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE: is set, and the cache has no copy of hf://mine/sharded" in other.stderr


def test_a_cache_that_lacks_a_shard(hub, tmp_path):
    first = fetch(hub, tmp_path, "print(hub.download('hf://mine/sharded'))")
    (Path(first.stdout.strip()) / "model-00002-of-00002.safetensors").unlink()
    again = fetch(hub, tmp_path, "hub.download('hf://mine/sharded')", HF_HUB_OFFLINE="1")
    assert "lacks model-00002-of-00002.safetensors" in again.stderr


def test_an_interrupted_download_continues(hub, tmp_path):
    """Files that are there are not asked for again, and a part does not pass for the whole."""
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    code = "import time; time.sleep = lambda _: None; print(hub.download('hf://mine/sharded'))"
    hub.refusals = {f"/{second}": (500, "")}
    lost = fetch(hub, tmp_path, code)
    assert lost.status == 1 and "Server error '500" in lost.stderr, lost.stderr
    offline = fetch(hub, tmp_path, code, HF_HUB_OFFLINE="1")
    assert offline.status == 1 and f"lacks {second}" in offline.stderr, offline.stderr
    hub.refusals = {}
    hub.sent.clear()
    again = fetch(hub, tmp_path, code)
    assert again.status == 0, again.stderr
    assert (Path(again.stdout.strip()) / second).read_bytes() == SHARDED[second]
    asked = {path.rpartition("/")[2] for path, _ in hub.sent}
    assert second in asked and first not in asked


def test_only_one_process_asks_the_hub(hub, tmp_path):
    """The others wait for its lock, and take what it has found."""
    code = (
        "import multiprocessing as m\n"
        "p = [m.Process(target=hub.download, args=('hf://mine/sharded',)) for _ in range(4)]\n"
        "[x.start() for x in p]; [x.join() for x in p]; print([x.exitcode for x in p])"
    )
    hub.sent.clear()
    result = fetch(hub, tmp_path, code)
    assert result.stdout.strip() == "[0, 0, 0, 0]", result.stderr
    asked = [path for path, _ in hub.sent if path.endswith("model-00001-of-00002.safetensors")]
    assert 1 <= len(asked) <= 2  # its size, and its content


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("hf://mine/gated", "is gated, and there is no token"),
        ("hf://mine/nothing", "does not exist, or is private"),
        ("hf://mine/small@v9", "has no branch, tag or commit of this name"),
        ("hf://mine", "does not name a repository"),
        ("hf://mine/pickled", "has no safetensors, but pytorch_model.bin"),
        ("hf://mine/quantised", "has no config.json and no safetensors, but model.Q4.gguf"),
    ],
)
def test_what_the_hub_does_not_give(hub, cli, tmp_path, path, text):
    result = fetch(hub, tmp_path, f"hub.download({path!r})")
    assert result.status == 1
    assert "checkpoint.initial_load_path = " in result.stderr and text in result.stderr


def test_a_gated_one_with_a_token(hub, tmp_path):
    result = fetch(hub, tmp_path, "hub.download('hf://mine/gated')", HF_TOKEN=READER)
    assert result.status == 0, result.stderr
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": READER}
    lost = fetch(hub, tmp_path, "hub.download('hf://mine/other')", **unreachable)
    assert "http://127.0.0.1:9 cannot be reached" in lost.stderr
    assert READER not in lost.stderr


CHECK = ("--job.dump_folder", "run", "--training.seq_len", "64", "--job.device", "cpu")


def differences(folder: Path, *settings: str) -> list[str]:
    """Return preflight's issues with a chosen flavor."""
    from torchtitan.config.load import load_config
    from torchtitan.config.run_context import RunContext
    from torchtitan.preflight import pretrained
    from torchtitan.training.pretrained_config import with_pretrained

    path = ("--checkpoint.enable", "--checkpoint.initial_load_path", str(folder))
    loaded = with_pretrained(load_config([*path, *settings]))
    with pytest.MonkeyPatch.context() as patch:  # what is loaded is another module's concern
        patch.setattr(pretrained, "decide", lambda *_: type("New", (), {"action": "new"}))
        found = pretrained.check_environment(RunContext(loaded.config, 1, "cpu"))
    return [f"{issue.severity}: {issue}" for issue in found]


def test_a_chosen_flavor_is_compared(folder):
    (text,) = differences(folder, "--model.flavor", "SmolLM2-135M")
    assert text.startswith('error: model.flavor = "SmolLM2-135M": is not the model of')
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:-1]}
    assert rows["dim"] == ["576", "64"]
    assert rows["rope_theta"] == ["100000.0", "20000.0"]
    assert rows["tied_embeddings"] == ["True", "False"]
    assert "max_seq_len" not in rows and "multiple_of" not in rows


def test_what_is_set_on_purpose_may_differ(folder):
    same = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 96,
        "rope_theta": 20000.0,
        "vocab_size": 2048,
    }
    settings = [part for k, v in same.items() for part in (f"--model.args.{k}", str(v))]
    assert differences(folder, *settings) == []
    assert differences(folder, *settings, "--model.args.rope_theta", "1e6") == []
    (text,) = differences(folder, *settings[:-4])
    assert "rope_theta" in text and "dim" not in text.splitlines()[2]


def test_a_vocabulary_of_another_size(folder):
    flavor = ("--model.flavor", "from_checkpoint", "--model.args.vocab_size")
    assert differences(folder, *flavor[:2]) == []
    (more,) = differences(folder, *flavor, "2050")
    assert more.startswith(
        "warning: model.args.vocab_size = 2050: adds 2 rows of zeros to the 2048"
    )
    (less,) = differences(folder, *flavor, "2000")
    assert less.startswith("error: model.args.vocab_size = 2000: less than the 2048 tokens")


def stored_run(path: Path, folder: Path, **more: object) -> list[str]:
    """A run that has begun from `folder`; return its settings."""
    from torchtitan.checkpoint import stored_run
    from torchtitan.config.load import load_config
    from torchtitan.config.toml_text import config_toml_text
    from torchtitan.training.pretrained_config import with_pretrained
    from torchtitan.weights.tokenizer_files import copy_tokenizer

    settings = [
        *FROM,
        "--checkpoint.initial_load_path",
        str(folder),
        "--job.dump_folder",
        str(path),
    ]
    config = with_pretrained(load_config(settings)).config
    path.mkdir()
    status = {"status": "completed", "step": 3}
    (path / stored_run.STATUS_NAME).write_text(json.dumps(status))
    (path / stored_run.CONFIG_NAME).write_text(config_toml_text(config))
    assert copy_tokenizer(config.model.tokenizer_path, path / stored_run.TOKENIZER_NAME)
    return settings


def test_a_run_needs_its_checkpoint_once(folder, tmp_path):
    from torchtitan.config.load import load_config
    from torchtitan.training.pretrained_config import with_pretrained

    settings = stored_run(tmp_path / "run", folder)
    before = with_pretrained(load_config(settings)).config.model
    assert before.tokenizer_path == str(folder)
    shutil.rmtree(folder)
    loaded = with_pretrained(load_config(settings))
    assert loaded.config.model.args == before.args
    assert loaded.config.model.tokenizer_path == str(tmp_path / "run" / "tokenizer")
    assert loaded.origins["model.args.dim"] == f"the run in {tmp_path / 'run'}"
    assert (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").is_file()
    changed = with_pretrained(load_config([*settings, "--model.args.n_layers", "7"]))
    assert changed.config.model.args == {**before.args, "n_layers": 7}
    with pytest.raises(ValueError, match="does not exist"):
        with_pretrained(load_config([*settings, "--job.new_run"]))


def test_a_step_brings_its_model_and_tokenizer(folder, tmp_path):
    from torchtitan.config.load import load_config
    from torchtitan.config.toml_file import tomllib
    from torchtitan.training.pretrained_config import with_pretrained

    stored_run(tmp_path / "run", folder)
    step = tmp_path / "run" / "checkpoint" / "step-3"
    step.mkdir(parents=True)
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    (step / "manifest.json").write_text(json.dumps({"info": {"config": config}}))
    settings = [*FROM, "--checkpoint.initial_load_path", str(step)]
    found = with_pretrained(load_config(settings)).config.model
    assert found.args == config["model"]["args"]
    assert found.tokenizer_path == str(tmp_path / "run" / "tokenizer")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    found = with_pretrained(load_config(settings)).config.model
    assert found.tokenizer_path == str(folder)
