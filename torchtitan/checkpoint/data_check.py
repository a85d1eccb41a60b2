"""Whether a start goes on with the data that its checkpoint was trained with. No torch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.decision import Decision
from torchtitan.checkpoint.initial import initial_path, without_excluded
from torchtitan.checkpoint.manifest import read_manifest
from torchtitan.checkpoint.steps_folder import step_name
from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.schema import Checkpoint


def stored_state(config: JobConfig, decision: Decision) -> dict[str, Any]:
    """Return the JSON state that a start goes on from; an empty one at the start of the data.

    `config` is the resolved one. Raises `InvalidCheckpoint`.
    """
    section = config.checkpoint
    if not section.enable or decision.action == "finished":
        return {}
    if decision.action == "resume" and decision.step > 0:
        folder = Path(config.job.dump_folder).resolve() / section.folder
        return read_manifest(folder / step_name(decision.step)).state
    if section.initial_load_path is None or section.initial_load_model_only:
        return {}
    manifest = read_manifest(initial_path(section))
    return without_excluded(manifest.state, section.exclude_from_loading)


def data_problems(
    section: Checkpoint,
    state: Mapping[str, Any],
    fingerprint: str,
    differences: Callable[[Mapping[str, Any] | None], Mapping[str, str]],
) -> list[ConfigIssue]:
    """Problems of going on from a stored `state` with the data of `fingerprint`. `differences`
    compares a stored summary with them: config key -> how it differs."""
    if state.get("data_fingerprint") in (None, fingerprint) or section.allow_dataset_change:
        return []
    fix = (
        "restore it, or train in another --job.dump_folder, or anew with --job.new_run;"
        " data.restart begins other data anew, with the next epoch;"
        " checkpoint.allow_dataset_change goes on regardless"
    )
    text = "differs from that of the checkpoint, whose place in the data then means nothing"
    return [
        ConfigIssue(key, f"{text}: {how}", fix)
        for key, how in differences(state.get("data_summary")).items()
    ]
