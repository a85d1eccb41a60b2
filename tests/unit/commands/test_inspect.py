"""`torchtitan inspect`: every kind of checkpoint, what is damaged, and how two differ."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import CONFIG, execute
from tests.foreign import args_of, random_weights, write_gguf, write_hf, write_meta
from torchtitan.checkpoint import contents
from torchtitan.checkpoint.model_folder import read_model_folder
from torchtitan.cli import main
from torchtitan.commands import printing
from torchtitan.weights.meta_params import to_meta_params

ARGS = args_of(n_heads=8, n_kv_heads=4, head_dim=None, ffn_dim=96, vocab_size=132)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a tiny model of bytes on two ranks, with steps 4 and 8."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(CONFIG)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    words = ["train", "config.toml", "--job.dump_folder=out", "--training.steps=8"]
    done = execute([*launcher, "-m", "torchtitan", *words], {}, folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def inspect(capsys: Any, *words: object, status: int = 0) -> Any:
    """The object that `--json` prints."""
    found = main(["inspect", *map(str, words), "--json"])
    printed = capsys.readouterr()
    assert found == status, printed.err
    return json.loads(printed.out), printed.err


def text(capsys: Any, *words: object) -> str:
    assert main(["inspect", *map(str, words)]) == 0
    return " ".join(capsys.readouterr().out.split(" "))


def refused(capsys: Any, *words: object, status: int) -> str:
    assert main(["inspect", *map(str, words)]) == status
    return str(capsys.readouterr().err)


def write(folder: Path, kind: str, weights: dict[str, torch.Tensor]) -> Path:
    """The model of ARGS in one of the formats."""
    folder.mkdir()
    if kind == "hf":
        write_hf(folder, weights, ARGS, num_shards=2)
    elif kind == "gguf":
        pytest.importorskip("gguf")
        write_gguf(folder / "model.gguf", weights, args=ARGS)
    else:
        write_meta(folder, weights, parts=2)
        params = to_meta_params(ARGS) | {"vocab_size": -1}  # type: ignore[arg-type]
        (folder / "params.json").write_text(json.dumps(params))
    return folder


def test_a_run(run_folder: Path, capsys: Any) -> None:
    report, _ = inspect(capsys, run_folder)
    assert report["path"] == str(run_folder / "checkpoint" / "step-8")
    assert (report["step"], report["finished"], report["kind"]) == (8, True, "step")
    assert report["tokens_seen"] == 8 * 8 * 32
    assert (report["lanes"], report["epochs"]) == (8, [0])
    assert report["mesh"]["dp_shard"] == 2
    assert report["config"]["training"]["seq_len"] == 32
    assert report["hyper_parameters"]["dim"] == 32
    assert report["tokenizer"] == {"path": "bytes", "tokens": 264, "chat_template": False}
    folder = read_model_folder(run_folder / "checkpoint" / "step-8")
    assert report["tensors"].keys() == folder.tensors.keys()
    name = "layers.1.feed_forward.w2.weight"
    weight = torch.empty(folder.tensors[name]["shape"])
    folder.load({name: weight})
    assert report["tensors"][name]["norm"] == pytest.approx(float(weight.double().norm()))
    assert report["tensors"][name]["largest"] == float(weight.abs().max())
    assert report["bytes"] == 4 * report["parameters"]
    assert report["optimizer"]["tensors"] == 3 * len(folder.tensors)


def test_a_run_as_text(run_folder: Path, capsys: Any) -> None:
    shown = text(capsys, run_folder)
    assert "step 8, its last; run" in shown and "saved on dp_shard 2" in shown
    assert "2,048 tokens seen; 8 lanes, in epoch 0" in shown
    assert "setting    training.seq_len = 32" in shown
    assert "264 tokens, bytes" in shown
    earlier = text(capsys, run_folder / "checkpoint" / "step-4", "--headers")
    assert "step 4 of 8 planned" in earlier


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf"])
def test_other_formats(tmp_path: Path, capsys: Any, kind: str) -> None:
    weights = random_weights(ARGS)
    report, _ = inspect(capsys, write(tmp_path / "model", kind, weights))
    assert (report["kind"], report["family"]) == (kind, "llama3")
    assert report["hyper_parameters"]["vocab_size"] == 132
    assert report["parameters"] == sum(weight.numel() for weight in weights.values())
    assert report["tensors"].keys() == weights.keys()
    for name, weight in weights.items():
        entry = report["tensors"][name]
        assert entry["norm"] == pytest.approx(float(weight.double().norm())), name
        assert entry["largest"] == float(weight.abs().max()), name


def test_a_folder_of_dcp(run_folder: Path, tmp_path: Path, capsys: Any) -> None:
    copy = shutil.copytree(run_folder / "checkpoint" / "step-8", tmp_path / "dcp")
    (copy / "manifest.json").unlink()
    report, _ = inspect(capsys, copy)
    assert report["kind"] == "dcp" and "hyper_parameters" in report
    assert report["notices"] == ["Without a manifest, damage may not be noticed."]
    both, _ = inspect(capsys, copy, run_folder)
    assert both["identical"] and both["compared"] == len(report["tensors"])


def test_two_formats_of_a_model(tmp_path: Path, capsys: Any) -> None:
    weights = random_weights(ARGS)
    hf = write(tmp_path / "hf", "hf", weights)
    meta = write(tmp_path / "meta", "meta", weights)
    report, _ = inspect(capsys, hf, meta)
    assert report["identical"] and report["compared"] == len(weights)
    changed = {name: weight.clone() for name, weight in weights.items()}
    changed["layers.1.attention.wk.weight"][3, 5] += 2.5
    changed["norm.weight"] += 0.5
    other = write(tmp_path / "other", "meta", changed)
    report, _ = inspect(capsys, hf, other)
    assert not report["identical"]
    assert list(report["values"]) == ["layers.1.attention.wk.weight", "norm.weight"]
    assert report["values"]["layers.1.attention.wk.weight"] == pytest.approx(2.5)
    shown = text(capsys, hf, other)
    assert "21 tensors compared (optimizer state is not in both), 2 differ" in shown
    assert inspect(capsys, hf, other, "--headers")[0]["values"] is None


def test_two_models(tmp_path: Path, capsys: Any) -> None:
    one = write(tmp_path / "one", "hf", random_weights(ARGS))
    args = args_of(n_heads=8, n_kv_heads=2, head_dim=None, ffn_dim=96, vocab_size=132, n_layers=3)
    weights = {name: weight.bfloat16() for name, weight in random_weights(args).items()}
    write_hf(tmp_path / "two", weights, args)
    report, _ = inspect(capsys, one, tmp_path / "two")
    assert report["hyper_parameters"] == {"n_layers": [2, 3], "n_kv_heads": [4, 2]}
    assert all(name.startswith("layers.2.") for name in report["only_in_second"])
    assert len(report["only_in_second"]) == 9 and report["only_in_first"] == []
    assert report["shapes"]["layers.0.attention.wk.weight"] == [[16, 32], [8, 32]]
    assert report["dtypes"]["norm.weight"] == ["float32", "bfloat16"]
    shown = text(capsys, one, tmp_path / "two")
    assert "only in the second: layers.2.attention.wq.weight" in shown


def test_two_steps(run_folder: Path, capsys: Any) -> None:
    steps = run_folder / "checkpoint"
    report, _ = inspect(capsys, steps / "step-4", steps / "step-8")
    assert report["optimizer_compared"] and report["config"] == {}
    assert report["values"]["optimizer.norm.weight.step"] == 4
    assert 0 < report["values"]["norm.weight"] < 0.1
    weights = [name for name in report["values"] if not name.startswith("optimizer.")]
    shown = text(capsys, steps / "step-4", steps / "step-8")
    assert [name for name in weights if f"\n{name} " in shown] == weights[:20]
    assert len(weights) == 21 and "1 other (--json has all): at most" in shown
    assert f"optimizer, step of {len(weights)} tensors: at most" in shown
    assert "optimizer.norm.weight.step" not in shown
    assert inspect(capsys, steps / "step-8", run_folder)[0]["identical"]


def test_progress(run_folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printing, "_SECONDS_BETWEEN_LINES", -1)
    _, errors = inspect(capsys, run_folder)
    assert "verifying: " in errors and f"reading {run_folder}" in errors
    _, errors = inspect(capsys, run_folder, run_folder)
    last = [line for line in errors.splitlines() if line.startswith("comparing: ")][-1]
    done, _, total = last.removeprefix("comparing: ").partition(" of ")
    assert done == total


def test_small_pieces_give_the_same(
    run_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = write(tmp_path / "hf", "hf", random_weights(ARGS))
    before = [inspect(capsys, path)[0]["tensors"] for path in (hf, run_folder)]
    monkeypatch.setattr(contents, "_PIECE_ELEMENTS", 100)
    monkeypatch.setattr(contents, "_BATCH_BYTES", 4000)
    opened = contents.open_contents(hf)
    assert max(piece.numel() for _, piece in opened.pieces(list(opened.tensors))) <= 132
    for path, tensors in zip((hf, run_folder), before):
        for name, entry in inspect(capsys, path)[0]["tensors"].items():
            assert entry.pop("norm") == pytest.approx(tensors[name].pop("norm")), name
            assert entry == tensors[name]


def test_damaged_steps(run_folder: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    step = run / "checkpoint" / "step-8"
    shard = max(step.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert f"{shard.name}: content differs" in refused(capsys, step, status=4)
    assert main(["inspect", str(step), "--headers"]) == 0
    capsys.readouterr()
    shard.write_bytes(content[:-1])
    report, errors = inspect(capsys, run, status=4)
    assert report["step"] == 4 and shard.name in report["damaged"][0]
    assert f"damaged: {shard}" in errors
    (run / "checkpoint" / "step-4" / "manifest.json").write_text("{}")
    assert "step-4/manifest.json: damaged" in refused(capsys, run, status=4)


def test_damaged_weights(tmp_path: Path, capsys: Any) -> None:
    weights = random_weights(ARGS)
    lacking = {name: weight for name, weight in weights.items() if name != "output.weight"}
    folder = write(tmp_path / "lacking", "hf", lacking)
    assert "output.weight is not in it" in refused(capsys, folder, status=4)
    weights["layers.0.ffn_norm.weight"][3] = float("nan")
    weights["layers.0.ffn_norm.weight"][5] = float("inf")
    folder = write(tmp_path / "nan", "hf", weights)
    report, errors = inspect(capsys, folder, status=5)
    assert report["tensors"]["layers.0.ffn_norm.weight"]["non_finite"] == 2
    assert "not finite: layers.0.ffn_norm.weight" in errors
    same, _ = inspect(capsys, folder, folder)
    assert same["identical"]
    whole = write(tmp_path / "whole", "hf", random_weights(ARGS))
    assert inspect(capsys, folder, whole)[0]["values"] == {"layers.0.ffn_norm.weight": None}
    next(folder.glob("*.safetensors")).unlink()
    assert "is missing" in refused(capsys, folder, status=4)
    (whole / "config.json").write_text('{"dim"')
    assert "config.json: cannot be read" in refused(capsys, whole, status=4)
    file = write(tmp_path / "gguf", "gguf", random_weights(ARGS)) / "model.gguf"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file}: is not a readable GGUF file" in refused(capsys, file, status=4)


def test_what_is_no_checkpoint(tmp_path: Path, capsys: Any) -> None:
    assert "CHECKPOINT = " in refused(capsys, tmp_path / "none", status=2)
    assert "CHECKPOINT = " in refused(capsys, tmp_path, status=2)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert "config.json: architectures" in refused(capsys, tmp_path, status=2)
    torch.save({}, tmp_path / "model.pt")
    (tmp_path / "config.json").unlink()
    assert "CHECKPOINT" in refused(capsys, tmp_path, status=2)
