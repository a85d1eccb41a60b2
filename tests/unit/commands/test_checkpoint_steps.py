"""`torchtitan checkpoint`: steps of real runs listed, verified and pruned, also when damaged."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.faults.damage import DAMAGES, flip, resign
from tests.faults.saving import recover, save_steps
from tests.pool import GlooPool
from torchtitan.checkpoint.inventory import Entry, take_inventory
from torchtitan.checkpoint.lock import FolderLock
from torchtitan.cli import main

CONTENTS_ONLY = {
    "shard-bit-first",
    "shard-bit-middle",
    "shard-bit-last",
    "shard-of-another-step",
    "metadata-bit",
    "metadata-half",
    "metadata-garbage",
    "metadata-evil",
    "metadata-evil-inside",
    "metadata-path-outside",
    "metadata-pickled-entry",
    "metadata-forgotten-chunk",
    "manifest-without-metadata",
}
"""Damage that names and sizes do not show."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 10 steps, saved at 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    runs.run(folder)
    return folder


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """A copy of it, where the paths in its config and manifests do not lead."""
    return Path(shutil.copytree(ended, tmp_path / "elsewhere"))


@pytest.fixture(scope="module")
def saved(gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Steps 1 to 3, saved by two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    gloo_pool.run(2, save_steps, str(folder), 3)
    yield folder


def checkpoint(capsys: Any, *words: object, status: int = 0) -> Any:
    """Return the object that `--json` prints; stderr without a damage or problem is empty."""
    found = main(["checkpoint", *map(str, words), "--json"])
    printed = capsys.readouterr()
    assert found == status, printed.err
    return json.loads(printed.out)


def refused(capsys: Any, *words: object, status: int = 2) -> str:
    assert main(["checkpoint", *map(str, words)]) == status
    return str(capsys.readouterr().err)


def listed(capsys: Any, folder: Path) -> dict[str, Entry]:
    entries = [Entry(**entry) for entry in checkpoint(capsys, "ls", folder)["entries"]]
    return {entry.name: entry for entry in entries}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


# --- ls -------------------------------------------------------------------------------------------


def test_ls_of_a_run(run: Path, capsys: Any) -> None:
    found = listed(capsys, run)
    assert list(found) == ["step-4", "step-8", "step-10"]
    assert [entry.state for entry in found.values()] == ["valid"] * 3
    assert [entry.tokens for entry in found.values()] == [1024, 2048, 2560]
    assert [entry.is_next for entry in found.values()] == [False, False, True]
    size = sum(path.stat().st_size for path in (run / "checkpoint" / "step-4").iterdir())
    assert found["step-4"].bytes == size and found["step-4"].model_only is False
    assert listed(capsys, run / "checkpoint") == found
    assert main(["checkpoint", "ls", str(run)]) == 0
    head, _, *rows, total = capsys.readouterr().out.splitlines()
    run_id = runs.status(run)["run_id"]
    expected = f"checkpoint: run {run_id}, completed; checkpoint.keep_latest_k = 10"
    assert head == f"{run}/{expected}"
    assert rows[2].split()[:2] == ["step-10", "valid"]
    assert rows[2].endswith(" 2,560   all    the next start takes it")
    assert total.endswith(" MiB in all")


def test_ls_of_what_is_not_a_step(run: Path, capsys: Any) -> None:
    folder = run / "checkpoint"
    run_id = runs.status(run)["run_id"]
    shutil.copytree(folder / "step-4", folder / "step-6")
    resign(folder / "step-6", run_id="other", step=6)
    for name in ("quarantine-step-2-0a", "rewound-step-12-0b", f".trash-{run_id}-step-1-0c"):
        shutil.copytree(folder / "step-4", folder / name)
    (folder / ".tmp-step-11-other-0d").mkdir()
    (folder / "step-9").symlink_to(folder / "step-4")
    (folder / "step-5").write_text("a file")
    found = listed(capsys, run)
    assert {name: entry.state for name, entry in found.items()} == {
        "step-4": "valid",
        "step-6": "foreign",
        "step-8": "valid",
        "step-9": "link",
        "step-10": "valid",
        f".trash-{run_id}-step-1-0c": "trash",
        "quarantine-step-2-0a": "quarantined",
        ".tmp-step-11-other-0d": "temporary",
        "rewound-step-12-0b": "rewound",
    }
    assert not any(entry.is_next for entry in found.values()), "a start is refused"
    assert found[".tmp-step-11-other-0d"].run_id == found["step-6"].run_id == "other"


def test_ls_shows_what_retention_keeps(tmp_path: Path, capsys: Any) -> None:
    runs.run(tmp_path / "run", "--checkpoint.keep_latest_k=2", "--checkpoint.interval=3")
    found = listed(capsys, tmp_path / "run")
    assert {name: entry.is_kept for name, entry in found.items()} == {
        "step-9": True,
        "step-10": True,
    }
    stored = tmp_path / "run" / "checkpoint"
    shutil.copytree(stored / "step-9", stored / "step-3")
    resign(stored / "step-3", step=3)
    assert listed(capsys, tmp_path / "run")["step-3"].is_kept is False


def test_ls_without_steps(run: Path, tmp_path: Path, capsys: Any) -> None:
    for path in (run / "checkpoint").iterdir():
        shutil.rmtree(path)
    assert checkpoint(capsys, "ls", run)["entries"] == []
    assert "holds no checkpoints" in refused(capsys, "ls", tmp_path)
    assert "holds no checkpoints" in refused(capsys, "ls", tmp_path / "missing")
    assert "holds no step" in refused(capsys, "verify", run)


# --- verify ---------------------------------------------------------------------------------------


def test_verify(run: Path, capsys: Any) -> None:
    folder = run / "checkpoint"
    steps = checkpoint(capsys, "verify", run)["steps"]
    assert steps == [{"path": str(folder / f"step-{step}"), "faults": []} for step in (4, 8, 10)]
    assert checkpoint(capsys, "verify", folder / "step-8")["steps"] == steps[1:2]
    flip("__0_0.distcp", 0.5)(folder / "step-8")
    flip(".metadata", 0.5)(folder / "step-8")
    shutil.copytree(folder / "step-8", folder / "quarantine-step-8-00")
    for path in (run, folder / "step-8", folder / "quarantine-step-8-00"):
        errors = refused(capsys, "verify", path, status=4)
        step = path if path != run else folder / "step-8"
        assert sorted(errors.splitlines()) == [
            f"damaged: {step}/{name}: content differs from what was written"
            for name in (".metadata", "__0_0.distcp")
        ]
    assert main(["checkpoint", "verify", str(run)]) == 4
    assert "step-8: damaged; no start loads it" in capsys.readouterr().out
    assert checkpoint(capsys, "verify", run, "--quick")["quick"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_shown(saved: Path, tmp_path: Path, damage: str, capsys: Any) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    DAMAGES[damage](folder / "step-3")
    errors = refused(capsys, "verify", folder, status=4)
    assert errors.startswith(f"damaged: {folder}/step-3") and errors.count("\n") == 1
    assert not (folder / "canary").exists()
    found = listed(capsys, folder)
    assert (found["step-3"].state == "valid") == (damage in CONTENTS_ONLY)
    assert main(["checkpoint", "verify", str(folder), "--quick"]) == (
        0 if damage in CONTENTS_ONLY else 4
    )
    assert found["step-2"].is_next == (damage not in CONTENTS_ONLY)


# --- diff -----------------------------------------------------------------------------------------


def test_diff(run: Path, capsys: Any) -> None:
    steps = run / "checkpoint"
    report = checkpoint(capsys, "diff", steps / "step-4", steps / "step-8")
    assert report["optimizer_compared"] and report["values"]["optimizer.norm.weight.step"] == 4
    assert checkpoint(capsys, "diff", steps / "step-10", run)["identical"]
    assert "OTHER" in refused(capsys, "diff", run)


# --- prune ----------------------------------------------------------------------------------------


def test_prune(run: Path, capsys: Any) -> None:
    before = names(run)
    report = checkpoint(capsys, "prune", run, "--keep", 2, "--dry-run")
    assert (report["deleted"], report["kept"], report["dry_run"]) == (["step-4"], [8, 10], True)
    assert names(run) == before
    assert main(["checkpoint", "prune", str(run), "--keep", "2"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step-4: deleted, ")
    assert last.endswith(" deleted; valid steps that stay: 8, 10")
    assert names(run) == ["step-10", "step-8"]
    assert checkpoint(capsys, "prune", run, "--keep", 5)["deleted"] == []
    assert checkpoint(capsys, "prune", run / "checkpoint", "--step", 8)["kept"] == [10]
    assert "step = 10: is the newest valid step" in refused(capsys, "prune", run, "--step", 10)
    assert "step = 8: is no valid step" in refused(capsys, "prune", run, "--step", 8)
    assert "is not told what to delete" in refused(capsys, "prune", run)
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
    assert names(run) == ["step-10"]
    runs.run(run, "--training.steps=12")  # the run can be continued
    assert runs.status(run)["step"] == 12


def test_prune_leaves_what_is_not_its_own(run: Path, capsys: Any) -> None:
    folder, run_id = run / "checkpoint", runs.status(run)["run_id"]
    for name in ("step-6", "step-5", "quarantine-step-3-0a", "rewound-step-12-0b", "step-5.bak"):
        shutil.copytree(folder / "step-4", folder / name)
    resign(folder / "step-6", run_id="other", step=6)
    resign(folder / "rewound-step-12-0b", run_id="other")
    (folder / "step-5" / "manifest.json").unlink()
    (folder / f".tmp-step-11-{run_id}-0d").mkdir()
    (folder / ".tmp-step-11-other-0d").mkdir()
    (folder / "step-7").symlink_to(folder / "step-4")
    before = names(run)
    assert checkpoint(capsys, "prune", run, "--keep", 1)["deleted"] == ["step-4", "step-8"]
    assert names(run) == sorted({*before} - {"step-4", "step-8"})
    removed = checkpoint(capsys, "prune", run, "--leftovers")["deleted"]
    assert sorted(removed) == [f".tmp-step-11-{run_id}-0d", "quarantine-step-3-0a"]
    assert names(run) == sorted({*before} - {"step-4", "step-8", *removed})
    for step in (5, 6, 7):
        assert "is no valid step" in refused(capsys, "prune", run, "--step", step)


@pytest.mark.parametrize("folder", ["../victim", "..", "", "/"])
def test_config_of_a_run_does_not_lead_out_of_its_folder(tmp_path: Path, folder: str) -> None:
    """Or `prune` would delete steps that are not the run's."""
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "run_status.json").write_text('{"run_id": "mine"}')
    (run / "config.toml").write_text(f"checkpoint.folder = {json.dumps(folder)}")
    assert take_inventory(run).folder == run / "checkpoint"


def test_prune_spares_a_running_job(run: Path, capsys: Any) -> None:
    before = names(run)
    lock = FolderLock(run, "abc")
    try:
        for folder in (run, run / "checkpoint"):
            errors = refused(capsys, "prune", folder, "--keep", 1)
            assert f"another job is using it (host {os.uname().nodename}, process" in errors
        assert checkpoint(capsys, "prune", run, "--keep", 1, "--dry-run")["kept"] == [10]
    finally:
        lock.release()
    assert names(run) == before
    checkpoint(capsys, "prune", run, "--keep", 2)
    FolderLock(run, "abc").release()  # prune has released it


def test_prune_reads_the_newest_step_first(run: Path, capsys: Any) -> None:
    """Its damage would else cost the step to fall back to."""
    flip("__0_0.distcp", 0.5)(run / "checkpoint" / "step-10")
    before = names(run)
    errors = refused(capsys, "prune", run, "--keep", 1, status=4)
    assert errors.startswith("error: nothing was deleted, as ") and "step-10/__0_0" in errors
    assert names(run) == before
    FolderLock(run, "abc").release()


class Killed(BaseException):
    """A process that ends in the middle of a deletion."""


def test_prune_killed_while_it_deletes(
    gloo_pool: GlooPool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)

    def delete_some(path: Path) -> None:
        next(Path(path).glob("*.distcp")).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", delete_some)
        with pytest.raises(Killed):
            main(["checkpoint", "prune", str(folder), "--keep", "1"])
    assert [entry.state for entry in listed(capsys, folder).values()] == ["valid"] * 2 + ["trash"]
    result = gloo_pool.run(2, recover, str(folder))[0]
    assert (result["step"], result["steps"]) == (3, [2, 3])
    assert not list(folder.glob(".trash-*"))
