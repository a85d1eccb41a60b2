"""The commands that a run ends with: only what applies, as a shell takes them."""

import logging
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.storing import make_step
from torchtitan.checkpoint.manifest import MANIFEST_NAME, write_manifest
from torchtitan.checkpoint.run_folder import RunFolder, Status
from torchtitan.commands.table import parse
from torchtitan.config import JobConfig
from torchtitan.training.ending import log_folder


def logged(
    caplog: pytest.LogCaptureFixture, run: Path, status: Status = "completed", **sections: object
) -> list[list[str]]:
    caplog.set_level(logging.INFO, logger="torchtitan")
    caplog.clear()
    config = JobConfig.model_validate({"job": {"dump_folder": str(run)}} | sections)
    log_folder(config, RunFolder(run, config, None, None), status)
    header, *lines = caplog.messages[0].splitlines()
    assert header.startswith(f"Run folder: {run}")
    assert ("without weights" in header) == (not config.checkpoint.enable)
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words for words in commands if words[0] != "source"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a step, in a folder whose name a shell would split."""
    folder = tmp_path / "it's my run"
    make_step(folder, 7)
    return folder


def test_a_finished_run_can_be_seen_plotted_tried_and_exported(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commands = logged(caplog, run, metrics={"enable_tensorboard": True})
    assert commands == [
        ["tensorboard", "--logdir", str(run / "tb")],
        ["torchtitan", "plot", str(run)],
        ["torchtitan", "generate", str(run), "Once upon a time"],
        ["torchtitan", "export", str(run), str(run / "hf-step-7")],
    ]
    for _, *words in commands[2:]:
        assert parse(words) is not None


def test_an_environment_that_is_not_active_is_activated_first(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    logged(caplog, run)
    assert f"  source {tmp_path / 'bin' / 'activate'} " in caplog.text
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    logged(caplog, run)
    assert "source" not in caplog.text


def test_modules_of_ones_own_are_named_again(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    *_, generate, export = logged(caplog, run, job={"custom_import": ["json", "html"]})
    for _, *words in (generate, export):
        assert words.pop() == "--job.custom_import=json,html"
        assert parse([*words, "--job.custom_import=json,html"]) is not None


def test_a_model_with_a_chat_template_can_be_talked_with(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    assert ["torchtitan", "chat", str(run)] in logged(caplog, run)


def test_adapters_are_exported_merged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = run / "checkpoint" / "step-8"
    manifest = make_step(run, 8)
    (step / MANIFEST_NAME).unlink()
    write_manifest(step, replace(manifest, state={"base": {"path": "b", "digest": "d"}}))
    export = logged(caplog, run)[-1]
    assert export == ["torchtitan", "export", "--merge", str(run), str(run / "hf-step-8")]


def test_an_export_that_is_there_or_will_be_is_not_offered(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert logged(caplog, run, checkpoint={"last_save_in_hf": True})[-1][1] == "generate"
    (run / "hf-step-7").mkdir()
    assert logged(caplog, run)[-1][1] == "generate"


def test_a_run_that_goes_on_has_its_curves_only(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [words[1] for words in logged(caplog, run, "preempted")] == ["plot"]
    assert logged(caplog, run, "seeded") == []


def test_a_run_without_a_usable_step_has_its_curves_only(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoint" / "step-7" / MANIFEST_NAME).write_text("{")
    assert [words[1] for words in logged(caplog, run)] == ["plot"]
    assert [words[1] for words in logged(caplog, run.parent)] == ["plot"]
