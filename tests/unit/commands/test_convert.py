"""`torchtitan convert`: a file that plain torch reads, or none."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.faults.damage import flip
from tests.faults.saving import Trainer, save_steps
from tests.pool import GlooPool
from torchtitan.cli import main
from torchtitan.distributed.context import DistributedContext


def save(world: DistributedContext, folder: str) -> dict[str, Any]:
    save_steps(world, folder, 1)
    trainer = Trainer(world)
    trainer.train_step(1)
    return {
        name: tensor.full_tensor().tolist()  # type: ignore[attr-defined]
        for name, tensor in trainer.tensors().items()
        if not name.startswith("optimizer.")
    }


@pytest.fixture(scope="module")
def step(
    gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A step that two ranks saved, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    weights = gloo_pool.run(2, save, str(folder))[0]
    return folder / "step-1", weights


def read(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True, mmap=True)  # noqa: TID251 (the format under test)


def test_file_has_the_weights(step: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "model.pt"
    assert main(["convert", "dcp-to-torch", str(step[0]), str(file)]) == 0
    weights = read(file)
    assert {name: tensor.tolist() for name, tensor in weights.items()} == step[1]
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())
    printed = capsys.readouterr()
    assert "3 tensors" in printed.out
    assert "verifying file" in printed.err and "reading it back" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_types_are_converted(step: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    assert main(["convert", "dcp-to-torch", str(step[0]), str(file), "--dtype=bfloat16"]) == 0
    for name, tensor in read(file).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.tensor(step[1][name]).bfloat16())


def test_folders_of_other_programs(tmp_path: Path) -> None:
    weights = {"a.weight": torch.arange(6.0).view(2, 3)}
    state = {"model": weights, "optimizer": {"a": torch.ones(2)}, "train_state": {"lr": [1, 2]}}
    dcp.save(state, checkpoint_id=tmp_path / "w", no_dist=True)
    assert main(["convert", "dcp-to-torch", str(tmp_path / "w"), str(tmp_path / "a.pt")]) == 0
    assert read(tmp_path / "a.pt")["a.weight"].tolist() == weights["a.weight"].tolist()
    assert len(read(tmp_path / "a.pt")) == 1


def test_values_that_do_not_fit(tmp_path: Path, capsys: Any) -> None:
    dcp.save({"a": torch.tensor([1e5])}, checkpoint_id=tmp_path / "w", no_dist=True)
    arguments = ["convert", "dcp-to-torch", str(tmp_path / "w"), str(tmp_path / "a.pt")]
    assert main([*arguments, "--dtype", "float16"]) == 4
    assert "a has a value of 100000, which is too large for float16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("is_taken", [False, True], ids=["free", "taken"])
def test_where_there_are_no_hard_links(
    step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, is_taken: bool
) -> None:
    """As on FAT; also when another program takes the file's name meanwhile."""
    file = tmp_path / "model.pt"

    def link(source: Path, target: Path) -> None:
        if is_taken:
            file.write_text("another's")
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    status = main(["convert", "dcp-to-torch", str(step[0]), str(file)])
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    if is_taken:
        assert status == 4 and "File exists" in capsys.readouterr().err
        assert file.read_text() == "another's"
    else:
        assert status == 0
        assert {name: tensor.tolist() for name, tensor in read(file).items()} == step[1]


def test_damage_makes_no_file(
    gloo_pool: GlooPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gloo_pool.run(2, save_steps, str(tmp_path), 1)
    flip("__1_0.distcp", 0.5)(tmp_path / "step-1")
    arguments = [str(tmp_path / "step-1"), str(tmp_path / "a.pt")]
    assert main(["convert", "dcp-to-torch", *arguments]) == 4
    assert "content differs from what was written" in capsys.readouterr().err
    assert not (tmp_path / "a.pt").exists()


def test_bad_arguments(step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.pt").write_text("keep me")
    new = str(tmp_path / "new.pt")
    cases = {
        (): "takes IN and OUT, not 1 paths",
        (str(step[0]), str(tmp_path / "there.pt")): "exists already",
        (str(step[0].parent), new): f"holds several checkpoints. Fix: name one, such as {step[0]}",
        (str(tmp_path / "gone"), new): "does not exist",
        (str(step[0]), str(tmp_path / "no" / "new.pt")): "a folder that does not exist",
        (str(step[0]), new, "--dtype", "int8"): "invalid choice: 'int8'",
        (str(step[0]), new, "--dtype"): "--dtype: expected one argument",
        (str(step[0]), new, "--fast"): "does not know --fast",
    }
    for arguments, text in cases.items():
        assert main(["convert", "dcp-to-torch", *arguments]) == 2
        assert text in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert main(["convert", "dcp-to-torch", str(tmp_path / "empty"), new]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
