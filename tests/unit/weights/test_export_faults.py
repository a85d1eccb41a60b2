"""Exports that cannot be right, or end half way: nothing half looks whole, and a rerun works."""

import json
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.foreign import args_of
from tests.forked import CONTEXT
from tests.pool import GlooPool
from tests.unit.weights.test_conversions import SUFFIXES, make
from tests.unit.weights.test_export import CONFIG, TOKENIZER, error_of, save_step
from torchtitan.cli import main
from torchtitan.config import CheckpointError, JobConfig
from torchtitan.distributed.context import DistributedContext
from torchtitan.training import ending
from torchtitan.training.export import Target, write_model
from torchtitan.training.open_model import open_model
from torchtitan.weights import writer

ARGS = args_of(dim=64, n_heads=8, n_kv_heads=4, head_dim=8, ffn_dim=128)
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face folder of 500 kB."""
    make(tmp_path / "in", ARGS)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def step(gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    gloo_pool.run(1, save_step, str(folder), {})
    return folder / "step-9"


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file gets larger, as on a full disk; Python ignores the signal, so that writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", SUFFIXES)
def test_no_space(model: Path, tmp_path: Path, kind: str, capsys: Any) -> None:
    out = tmp_path / f"out{SUFFIXES[kind]}"
    words = ["convert", str(model), str(out), "--format", kind]
    with largest_file(60_000):
        assert main(words) == 4
    text = capsys.readouterr().err
    assert f"{out} could not be written" in text and "Traceback" not in text
    assert names(tmp_path) == ["in"]
    assert main(words) == 0


def killed(source: str, out: str) -> None:
    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    writer._write_json = kill  # type: ignore[assignment]  # the weights are written by then
    main(["export", source, out])


@pytest.mark.fault("F52")
def test_killed_in_the_middle(model: Path, tmp_path: Path, caplog: Any) -> None:
    out = tmp_path / "out"
    process = CONTEXT.Process(target=killed, args=(str(model), str(out)))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path != model)
    assert left.name.startswith(".out.") and left.name.endswith(".unfinished")
    with caplog.at_level(logging.WARNING):
        assert main(["export", str(model), str(out)]) == 0
    assert f"{left} is of an export that was killed" in caplog.text
    assert (
        load_file(out / "model.safetensors").keys() == load_file(left / "model.safetensors").keys()
    )


def test_where_nothing_can_be_written(model: Path, capsys: Any) -> None:
    assert "/proc/out could not be written" in error_of(capsys, "export", model, "/proc/out")


def test_targets_that_would_harm(step: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("keep me")
    cases = {
        tmp_path / "link": "exists already",
        tmp_path / "file": "exists already",
        step / "hf": "would count as a part of a run's checkpoints",
        step.parent / "step-10": "would count as a part of a run's checkpoints",
    }
    for out, text in cases.items():
        for command in ("export", "convert"):
            assert text in error_of(capsys, command, model, out)
    assert (tmp_path / "file").read_text() == "keep me" and names(step.parent) == ["step-9"]
    assert main(["export", str(step), str(step.parent / "for-transformers")]) == 0


def test_shards_smaller_than_a_tensor(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(model), str(out), "--max-shard-size=1KB"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    weights = load_file(model / "model.safetensors")
    assert index.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(load_file(out / index[name])[name], weight)
    large = [file for file in out.glob("*.safetensors") if len(load_file(file)) > 1]
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 1000 for file in large)


@pytest.mark.parametrize("value", ["nan", "-inf"])
@pytest.mark.parametrize("kind", ["hf", "pt"])
def test_what_is_no_number_is_named(
    model: Path, tmp_path: Path, capsys: Any, kind: str, value: str
) -> None:
    weights = load_file(model / "model.safetensors")
    weights[Q][3, 4] = float(value)
    save_file(weights, model / "model.safetensors")
    text = error_of(capsys, "convert", model, tmp_path / "out", "--format", kind)
    assert "layers.1.attention.wq.weight has values that are not finite numbers" in text
    assert names(tmp_path) == ["in"]


def test_more_tokens_than_rows(model: Path, tmp_path: Path, capsys: Any) -> None:
    for kind in ("hf", "gguf", "meta"):
        words = ("export", model, tmp_path / "out", f"--tokenizer={TOKENIZER}", f"--format={kind}")
        text = error_of(capsys, *words)
        assert "has 2011 tokens, but the model only 131 rows; name its own tokenizer" in text
    assert names(tmp_path) == ["in"]


def changed_table(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def opened(path: Path) -> Any:
        model = open_model(path)
        rows = tuple(map(change, model.family.hf_weights))
        return replace(model, family=replace(model.family, hf_weights=rows))

    return opened


def swap_gates(row: Any) -> Any:
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for name, other in swapped.items():
        if name in row.theirs:
            return replace(row, theirs=row.theirs.replace(name, other))
    return row


TABLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "two swapped": (swap_gates, "transformers computes something else"),
    "rows as ours": (
        lambda row: replace(row, rope=row.rope and "wk" not in row.ours),
        "transformers computes something else",
    ),
    "one name twice": (
        lambda row: replace(row, theirs=row.theirs.replace("k_proj", "v_proj")),
        r"layers\.0\.attention\.wk\.weight is not there in the export",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_wrong_table_of_names(model: Path, tmp_path: Path, case: str) -> None:
    """Our own reading has the same table, so only transformers notices the first two."""
    change, text = TABLES[case]
    with pytest.raises(CheckpointError, match=text):
        write_model(changed_table(change)(model), Target(tmp_path / "out"))
    assert names(tmp_path) == ["in"]


def save_with_handler(world: DistributedContext, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIG["model"], "handlers", ["bitnet"])  # type: ignore[arg-type]
        save_step(world, folder, {})


def test_a_run_with_handlers(gloo_pool: GlooPool, tmp_path: Path, capsys: Any) -> None:
    """Its tensors alone can be had, from the folder of the run, too."""
    gloo_pool.run(1, save_with_handler, str(tmp_path / "run" / "checkpoint"))
    text = error_of(capsys, "export", tmp_path / "run", tmp_path / "out")
    assert "was trained with bitnet, which other programs lack" in text
    assert names(tmp_path) == ["run"]
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out.pt")]) == 0


def test_the_last_step_on_a_full_disk(
    step: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint").symlink_to(step.parent)
    config = JobConfig.model_validate({**CONFIG, "checkpoint": {"last_save_in_hf": True}})
    folder: Any = SimpleNamespace(path=tmp_path)
    with largest_file(60_000):
        assert ending.export_last_step(config, folder) == 4
    assert "The run is saved; see `torchtitan export" in caplog.text
    assert names(tmp_path / "hf") == []
    assert ending.export_last_step(config, folder) == 0
    assert names(tmp_path / "hf") == ["step-9"]


@pytest.mark.parametrize("name", ["with space", "100%s", "ünï", "a\nb", "model.PT", "[x]*?"])
def test_odd_names(model: Path, tmp_path: Path, name: str) -> None:
    link = tmp_path / f"link to {name}"
    link.symlink_to(model)
    assert main(["convert", str(link), str(tmp_path / name)]) == 0
    assert (tmp_path / name).is_file() == name.endswith("PT")
    if not name.endswith("PT"):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "a.GGUF")]) == 0
        assert (tmp_path / "a.GGUF").read_bytes().startswith(b"GGUF")
