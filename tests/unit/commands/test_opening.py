"""The checkpoint and the tokenizer that a command line opens."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.foreign import args_of, random_weights, write_meta
from tests.unit.hub_server import Hub
from tests.unit.weights.test_pretrained import READER, REPOSITORIES, fetch
from torchtitan.checkpoint.manifest import Manifest, read_manifest, write_manifest
from torchtitan.commands.table import parse
from torchtitan.config import CheckpointError, ConfigError
from torchtitan.config.load import load_config
from torchtitan.training.open_model import config_of_step
from torchtitan.training.pretrained import describe_pretrained
from torchtitan.weights.meta_params import to_meta_params

TOKENIZER = Path(__file__).parents[2] / "assets" / "tokenizer"


def plant_step(folder: Path, number: int, *settings: str) -> Path:
    """A step without tensors."""
    step = folder / f"step-{number}"
    step.mkdir(parents=True)
    config = json.loads(load_config(list(settings)).config.model_dump_json(exclude_none=True))
    write_manifest(step, Manifest("run", number, True, {}, {}, {}, {"config": config}))
    return step


def test_the_newest_step_that_is_intact(tmp_path: Path) -> None:
    steps = [plant_step(tmp_path / "checkpoint", number) for number in (3, 12)]
    assert describe_pretrained(str(tmp_path)).path == steps[1]
    (steps[1] / "manifest.json").write_text("{}")
    found = describe_pretrained(str(tmp_path))
    assert found.path == steps[0]
    assert "step-12/manifest.json" in found.notices[0] and "damaged" in found.notices[0]
    (steps[0] / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-3/manifest\.json.*; .*step-12"):
        describe_pretrained(str(tmp_path))


def test_checkpoints_under_another_name(tmp_path: Path) -> None:
    step = plant_step(tmp_path / "mine", 3)
    (tmp_path / "config.toml").write_text('[checkpoint]\nfolder = "mine"\n')
    assert describe_pretrained(str(tmp_path)).path == step


def test_a_run_is_opened_with_the_tokenizer_that_it_was_trained_with(tmp_path: Path) -> None:
    """Its copy has the chat template, and stays when the original changes or is gone."""
    shutil.copytree(TOKENIZER, tmp_path / "given")
    settings = ("--model.tokenizer_path", str(tmp_path / "given"))
    plant_step(tmp_path / "run" / "checkpoint", 3, *settings)
    assert describe_pretrained(str(tmp_path / "run")).folders == (tmp_path / "given",)
    shutil.move(tmp_path / "given", tmp_path / "run" / "tokenizer")
    found = describe_pretrained(str(tmp_path / "run"))
    assert found.folders == (tmp_path / "run" / "tokenizer",)
    assert found.tokenizer.vocab_size == 2011
    shutil.copytree(TOKENIZER, tmp_path / "given")
    assert describe_pretrained(str(tmp_path / "run")).folders == found.folders


def test_metas_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "model")
    args = args_of(n_heads=8, n_kv_heads=4, head_dim=None, ffn_dim=96, vocab_size=2011)
    write_meta(tmp_path / "model", random_weights(args))
    params = to_meta_params(args) | {"vocab_size": -1}  # type: ignore[arg-type]
    (tmp_path / "model" / "params.json").write_text(json.dumps(params))
    assert describe_pretrained(str(tmp_path / "model")).args.vocab_size == 2011


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^CHECKPOINT = .*did you mean hf://mine/absent\?"):
        describe_pretrained("mine/absent")
    with pytest.raises(ConfigError, match=r"^CHECKPOINT = .*is no checkpoint, and holds none"):
        describe_pretrained(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^CHECKPOINT = .*torch.save only.*save_pretrained"):
        describe_pretrained(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    step = plant_step(tmp_path / "run", 3)
    with pytest.raises(ConfigError, match=r"one file of a checkpoint. Fix: name its folder, .*-3"):
        describe_pretrained(str(step / "manifest.json"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"^CHECKPOINT = .*2 GGUF files"):
        describe_pretrained(str(tmp_path))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(REPOSITORIES, tokens=(READER,)) as server:
        yield server


def test_a_repository_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    code = "from torchtitan.training.pretrained import describe_pretrained as d"
    done = fetch(hub, tmp_path, f"{code}\nprint(d('hf://mine/small').args.dim)")
    assert done.stdout.strip() == "64", done.stderr
    done = fetch(hub, tmp_path, f"{code}\nd('hf://mine/nothing')")
    assert 'CHECKPOINT = "mine/nothing": does not exist, or is private' in done.stderr


def test_stored_config_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made the checkpoint is not asked what to run; the user may name its modules."""
    name = "planted_by_a_checkpoint"
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    step = plant_step(tmp_path / "checkpoint", 3, f"--job.custom_import={name}")
    with pytest.raises(ConfigError, match=f"add --job.custom_import={name}"):
        describe_pretrained(str(step))
    with pytest.raises(ConfigError, match=f"add --job.custom_import={name}"):
        config_of_step(read_manifest(step))
    words = (["generate", str(step)], ["export", str(step), "OUT"], ["convert", str(step), "OUT"])
    for command in words:
        with pytest.raises(ConfigError, match="RuntimeError: executed"):
            parse([*command, f"--job.custom_import={name}"])
    (tmp_path / f"{name}.py").write_text("")
    parse(["generate", str(step), f"--job.custom_import={name}"])
    assert describe_pretrained(str(step)).path == step
