"""The decision on a start in a run folder. Only reads. No torch.

`decide` returns one of three actions, or raises `ConfigError` with all problems:

- "new": the folder holds no run, or `job.new_run` is set;
- "resume": it holds this run, unfinished or with `training.steps` or `data.epochs` raised;
- "finished": it holds this run, and there is nothing left to do.

A folder with only a seed checkpoint is a run that has not begun: a run that starts from it must
have the same model and checkpoint folder, and may differ in everything else.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchtitan.checkpoint.base_place import MovedBase, place_of_base
from torchtitan.checkpoint.config_diff import MUST_NOT, WAYS_OUT, compare, epochs_grow, stored_value
from torchtitan.checkpoint.initial import initial_start
from torchtitan.checkpoint.manifest import HANDLERS_STATE, base_of
from torchtitan.checkpoint.steps_folder import step_folders, step_problems
from torchtitan.checkpoint.stored_run import (
    CONFIG_NAME,
    PENDING_NAME,
    STATUS_NAME,
    StoredRun,
)
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.utils.environment import is_restart
from torchtitan.utils.text import plural

LOAD_STEP_NAME = "load_step"
"""The key in a manifest's `info` of the `checkpoint.load_step` that the job was started with."""

Action = Literal["new", "resume", "finished"]


@dataclass(frozen=True)
class Decision:
    """The decision on a start in a run folder.

    `step` is the step to continue from (0: from the beginning), or the last one of a finished run.
    A batch size and lanes that the config leaves open are those stored with the run.
    """

    action: Action
    run_id: str
    step: int
    global_batch_size: int
    num_lanes: int
    load_step: int = -1
    """The step to load; -1 for the newest, also once `checkpoint.load_step` has been followed."""
    asked_load_step: int = -1
    """`checkpoint.load_step` of the config."""
    had_ended: bool = False
    """The run had ended before this start, which may continue it."""
    warmup_steps: int | None = None
    """Warmup of the built-in schedule; None for other schedules."""
    replaces_run: bool = False
    """`job.new_run`: `RunFolder.begin` moves the run in the folder aside."""
    notices: tuple[str, ...] = ()


def starts_anew(config: JobConfig) -> bool:
    """Return whether to move the run in the folder aside.

    Not on a restart by the launcher, which repeats the command, if the first start has begun: the
    run in the folder is then that one.
    """
    pending = Path(config.job.dump_folder) / PENDING_NAME
    return config.job.new_run and (not is_restart() or pending.exists())


def decide(config: JobConfig, context: RunContext, path: Path) -> Decision:
    """Decide what a start with `config` in `path` does. Raises `ConfigError`."""
    stored = StoredRun(path, config.checkpoint.folder)
    folder = path / config.checkpoint.folder
    holds_files = (path / STATUS_NAME).exists() or bool(step_folders(folder))
    if starts_anew(config) and holds_files:
        return _replacement(context)
    if not stored.is_run:
        _refuse_foreign_config(path)
        return _new(context, secrets.token_hex(6), step_problems(config.checkpoint, folder))
    if config.checkpoint.create_seed_checkpoint and stored.trained:
        return _seed_again(config, context, stored)
    newest_id = stored.newest.run_id if stored.newest else secrets.token_hex(6)
    run_id = str(stored.status.get("run_id") or newest_id)
    if not stored.trained:
        # The run died before it trained anything, perhaps because of its config.
        return _new(context, run_id, step_problems(config.checkpoint, folder))
    if stored.config is None:
        text = f"holds a run whose {CONFIG_NAME} cannot be read, so it cannot be compared"
        fix = f"restore {CONFIG_NAME} in it, {WAYS_OUT}"
        raise ConfigError(ConfigIssue("job.dump_folder", text, fix, str(path)))
    problems, notices = compare(stored.config, config)
    if stored.is_seed:
        problems, notices = _seed_problems(problems), ["The run starts from the seed checkpoint."]
    asked = config.checkpoint.load_step
    if _is_done(asked, stored):
        notices.append(
            f"checkpoint.load_step = {asked} has been followed already: the run continues from its"
            " newest step. To go back again, move the later steps away first."
        )
        config = changed_config(config, checkpoint={"load_step": -1})
    if not problems:
        problems = _continuation_problems(config, stored, run_id, folder)
    if problems:
        raise ConfigError(problems)
    if config.job.new_run:
        notices.append("job.new_run is ignored: the launcher has started this job again.")
    action, step, more = _action(config, stored)
    notices += more
    if not stored.good:
        start = initial_start(context)
        if start.step:
            step, notices = start.step, []
        notices += start.notices
    else:
        notices += _notices_of_start(config, stored)
    batch, lanes, warmup, more = _open_values(context, {} if stored.is_seed else stored.config)
    notices += [*more, *_older_rule(stored, warmup)] if action == "resume" else []
    return Decision(
        action,
        run_id,
        step,
        batch,
        lanes,
        load_step=config.checkpoint.load_step,
        asked_load_step=asked,
        had_ended=bool(stored.ended),
        warmup_steps=warmup,
        notices=tuple(notices),
    )


def resolved_config(config: JobConfig, decision: Decision) -> JobConfig:
    """Return `config` with the batch size, lanes, warmup and step to load of the decision.

    A seed checkpoint, which is for every mesh, leaves them open.
    """
    # Training from the stored config.toml must not move this run aside.
    config = changed_config(config, job={"new_run": False})
    if config.checkpoint.create_seed_checkpoint:
        return config
    return changed_config(
        config,
        training={"global_batch_size": decision.global_batch_size},
        data={"lanes": decision.num_lanes},
        checkpoint={"load_step": decision.load_step},
        lr_scheduler={} if (steps := decision.warmup_steps) is None else {"warmup_steps": steps},
    )


def changed_config(config: JobConfig, **sections: dict[str, Any]) -> JobConfig:
    """Return `config` with some keys of some sections changed."""
    update = {
        name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()
    }
    return config.model_copy(update=update)


def _new(context: RunContext, run_id: str, problems: list[ConfigIssue]) -> Decision:
    """Return the decision on a new run; raise `ConfigError` if there are problems."""
    if problems:
        raise ConfigError(problems)
    start = initial_start(context)
    return Decision(
        "new",
        run_id,
        start.step,
        start.global_batch_size,
        start.num_lanes,
        warmup_steps=context.warmup_steps,
        notices=start.notices,
    )


def _notices_of_start(config: JobConfig, stored: StoredRun) -> list[str]:
    """Return what becomes of `checkpoint.initial_load_path` in a run with checkpoints."""
    if base := base_of(stored.newest):
        return [f"What is frozen comes from {base['path']}, or from where that is now."]
    if config.checkpoint.initial_load_path is None:
        return []
    return ["checkpoint.initial_load_path is ignored: the run has its own checkpoints."]


def _replacement(context: RunContext) -> Decision:
    """Decide on a new run in the place of another one."""
    step = context.config.checkpoint.load_step
    text = "belongs to the old run, which job.new_run moves aside"
    issue = ConfigIssue("checkpoint.load_step", text, "leave out one of the two", step)
    problems = [issue] if step >= 0 else []
    return replace(_new(context, secrets.token_hex(6), problems), replaces_run=True)


def _seed_again(config: JobConfig, context: RunContext, stored: StoredRun) -> Decision:
    """Decide on `create_seed_checkpoint` in a folder that already holds checkpoints or a run."""
    newest = stored.newest
    if not stored.is_seed or stored.config is None or newest is None:
        text = f"would write initial weights into a run that is at step {stored.step}"
        fix = f"remove it; {WAYS_OUT}"
        raise ConfigError(ConfigIssue("checkpoint.create_seed_checkpoint", text, fix, True))
    problems = _seed_problems(compare(stored.config, config)[0])
    if problems:
        raise ConfigError(problems)
    batch, lanes = context.global_batch_size, context.num_lanes
    notices = ("The seed checkpoint already exists.",)
    return Decision("finished", newest.run_id, 0, batch, lanes, notices=notices)


def _seed_problems(problems: list[ConfigIssue]) -> list[ConfigIssue]:
    """Return the differences that a run may not have from the seed it starts from."""
    return [p for p in problems if p.key.startswith("model.") or p.key in MUST_NOT]


def _is_done(load_step: int, stored: StoredRun) -> bool:
    """Return whether the run has already continued from `load_step`.

    The same command, repeated, must not undo what was trained since. The newest checkpoint knows,
    so a kill between two files cannot make this wrong.
    """
    newest = stored.newest
    if load_step < 0 or newest is None:
        return False
    return newest.step > load_step and newest.info.get(LOAD_STEP_NAME) == load_step


def _action(config: JobConfig, stored: StoredRun) -> tuple[Action, int, list[str]]:
    """Return the action for a run that may continue, its step, and notices."""
    steps, load_step, last = config.training.steps, config.checkpoint.load_step, stored.step
    if 0 <= load_step < last:
        return "resume", load_step, [f"Going back from step {last} to step {load_step}."]
    if stored.ended == "data_exhausted" and not _has_more_data(config, stored):
        return "finished", last, [f"The run is finished: its data ended at step {last}."]
    if last >= steps:
        return "finished", last, [f"The run is finished: it has trained {plural(last, 'step')}."]
    if not stored.good:
        return "resume", 0, ["The run has no checkpoint yet: it starts again from step 0."]
    return "resume", last, []


def _has_more_data(config: JobConfig, stored: StoredRun) -> bool:
    """Return whether `data.epochs` grew since the last save."""
    return epochs_grow(stored.planned("data.epochs"), config.data.epochs)


def _continuation_problems(
    config: JobConfig, stored: StoredRun, run_id: str, folder: Path
) -> list[ConfigIssue]:
    """Return the reasons why this run cannot continue as configured."""
    checkpoint, steps = config.checkpoint, config.training.steps
    strangers = [manifest for manifest in stored.good if manifest.run_id != run_id]
    if strangers:
        text = f"holds step {strangers[0].step} of another run, {strangers[0].run_id}"
        fix = f"move that step away, {WAYS_OUT}"
        return [ConfigIssue("checkpoint.folder", text, fix, str(folder))]
    key: str = "training.steps"
    value: int | None = steps
    exhausted = stored.ended == "data_exhausted"
    if exhausted and _has_more_data(config, stored):
        exhausted, key, value = False, "data.epochs", config.data.epochs
    done = exhausted or stored.step >= steps
    if done and checkpoint.load_step in (-1, stored.step):
        return []
    if stored.step_folders and not checkpoint.enable:
        text = f"would start from step 0 again, but steps {stored.step_folders} are saved"
        return [ConfigIssue("checkpoint.enable", text, f"set it to true, {WAYS_OUT}", False)]
    if stored.ended and not stored.step_folders:
        text = f"the run finished at step {stored.step} and left no checkpoint to continue from"
        return [ConfigIssue(key, text, f"set it back, {WAYS_OUT}", value)]
    newest = stored.newest
    # A model without optimizer state at step 0 is a seed checkpoint.
    if checkpoint.load_step < 0 and newest is not None and newest.model_only and newest.step > 0:
        text = f"the checkpoint of step {newest.step} has no optimizer state to continue from"
        fix = (
            "choose an earlier one with checkpoint.load_step and checkpoint.allow_rewind, and set"
            f" checkpoint.last_save_model_only = false; {WAYS_OUT}"
        )
        return [ConfigIssue(key, text, fix, value)]
    base, given = base_of(newest), checkpoint.initial_load_path
    if base and place_of_base(base, MovedBase(path=given)) is None:
        text = f"the run's checkpoints refer to the base model {base['path']}, which is missing"
        fix = "restore it, or set this to where it is now"
        return [ConfigIssue("checkpoint.initial_load_path", text, fix, given)]
    return step_problems(checkpoint, folder)


def _open_values(
    context: RunContext, stored: Mapping[str, Any]
) -> tuple[int, int, int | None, list[str]]:
    """Return batch size, lanes and warmup, stored or from config and mesh, and notices."""
    notices = []

    def resolve(key: str, now: int) -> int:
        before = stored_value(stored, key)
        if not isinstance(before, int) or before < 0:
            return now
        if before != now:
            notices.append(f"{key} stays {before}, as at the first start; it would be {now} here.")
        return before

    warmup = context.warmup_steps
    return (
        resolve("training.global_batch_size", context.global_batch_size),
        resolve("data.lanes", context.num_lanes),
        None if warmup is None else resolve("lr_scheduler.warmup_steps", warmup),
        notices,
    )


def _older_rule(stored: StoredRun, warmup: int | None) -> list[str]:
    """Return a notice if the checkpoint is of a release with another built-in schedule.

    That release saved no state of handlers, not even an empty one.
    """
    state = stored.newest.state if stored.newest else {}
    if warmup is None or not state.get("step") or HANDLERS_STATE in state:
        return []
    return [
        "The checkpoint is of an earlier release, whose learning rate never reached its peak. From"
        " here on it follows the rule in docs/guides/optimizers.md, so the curve may bend a little."
    ]


def with_stored_batch(context: RunContext) -> RunContext:
    """Return `context` with open batch size, lanes and warmup as stored with the run.

    They come from the run in the folder, or from the checkpoint that a new run starts from. For
    checks before `decide`: derived from another mesh or more steps they would differ. Refuses
    nothing, and reads only status, config and names, because every rank calls it.
    """
    config, warmup = context.config, None
    try:
        path = Path(config.job.dump_folder).resolve()
        stored = StoredRun(path, config.checkpoint.folder)
        if stored.trained and not starts_anew(config):
            known = {} if stored.is_seed or stored.config is None else stored.config
            batch, lanes, warmup, _ = _open_values(context, known)
        else:
            start = initial_start(context)
            batch, lanes = start.global_batch_size, start.num_lanes
    except (ConfigError, OSError, ValueError):
        return context
    config = changed_config(
        config,
        training={"global_batch_size": batch} if config.training.global_batch_size < 0 else {},
        data={"lanes": lanes} if config.data.lanes is None else {},
        lr_scheduler={"warmup_steps": warmup} if config.lr_scheduler.warmup_steps is None else {},
    )
    return replace(context, config=config)


def _refuse_foreign_config(path: Path) -> None:
    """Raise `ConfigError` for a `config.toml` that no run wrote: it would be overwritten."""
    file = path / CONFIG_NAME
    if file.exists():
        text = f"holds a {CONFIG_NAME} that no run has written and that would be overwritten"
        fix = "choose another --job.dump_folder, or rename that file"
        raise ConfigError(ConfigIssue("job.dump_folder", text, fix, str(path)))
