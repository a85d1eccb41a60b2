"""The number of steps of a run that only says how many epochs it takes.

The schedule of the learning rate needs it before the first step, and how many sequences an epoch
gives is known only when its rows are tokenised and packed. So they are, once, and the number is
stored with the run; a resume takes it from there. Data that would take long are not counted. It
does not depend on the mesh. No torch is needed but by the data.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.checkpoint.config_diff import stored_value
from torchtitan.checkpoint.decision import starts_anew, with_stored_batch
from torchtitan.checkpoint.stored_run import StoredRun
from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.load import LoadedConfig
from torchtitan.config.run_context import RunContext

if TYPE_CHECKING:
    from torchtitan.data.mixture import Mixture

logger = logging.getLogger(__name__)

_STEPS = "training.steps"
_MOST_BYTES = 2**28
"""Larger data, and streams, are not counted: tokenising them takes minutes, or more."""


def with_epoch_steps(loaded: LoadedConfig, context: RunContext) -> LoadedConfig:
    """Return the config with `training.steps` as many as `data.epochs` are, if only these are set.

    Every rank calls it. Raises DataError for a row that cannot be used.
    """
    config = loaded.config
    epochs = config.data.epochs
    if epochs is None or "steps" in config.training.model_fields_set:
        return loaded
    steps = _of_run(config)
    if steps is None:
        steps = _count(with_stored_batch(context))
        if steps is None:
            text = f"is unset, and {config.training.steps} in this run: the data are too large for"
            return replace(
                loaded, notices=(*loaded.notices, f"{_STEPS} {text} counting what epochs are")
            )
    training = config.training.model_copy(update={"steps": steps})
    return replace(
        loaded,
        config=config.model_copy(update={"training": training}),
        origins={**loaded.origins, _STEPS: f"data.epochs = {epochs}"},
        notices=(
            *loaded.notices,
            f"{_STEPS} is unset, and {steps} in this run: data.epochs = {epochs} of the data",
        ),
    )


def _of_run(config: JobConfig) -> int | None:
    """Return the steps of the run in the folder, if they are of as many epochs."""
    if starts_anew(config):
        return None
    stored = StoredRun(Path(config.job.dump_folder).resolve(), config.checkpoint.folder)
    if not stored.trained or stored.config is None:
        return None
    steps = stored_value(stored.config, _STEPS)
    same = stored_value(stored.config, "data.epochs") == config.data.epochs
    return steps if same and isinstance(steps, int) else None


def _count(context: RunContext) -> int | None:
    """Return the steps of the epochs; None where they are not counted.

    An error of the config is left to the checks, which report it.
    """
    from torchtitan.data.loader import build_mixture
    from torchtitan.data.tokenizers import build_tokenizer

    config, num_lanes = context.config, context.num_lanes
    if context.global_batch_size % num_lanes or len(config.data.sources) > 1:
        return None
    try:
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        mixture = build_mixture(
            config.training, config.data, config.debug.seed, tokenizer, num_lanes
        )
    except ConfigError:
        return None
    files = getattr(mixture.sources[0].source, "files", ())
    if not 0 < sum(file.size for file in files) <= _MOST_BYTES:
        return None
    per_lane = context.global_batch_size // num_lanes
    return max(1, max(-(-count_sequences(mixture, v) // per_lane) for v in range(num_lanes)))


def count_sequences(mixture: "Mixture", index: int) -> int:
    """Return the sequences that a lane gives until its epochs are over. Raises DataError."""
    lane, count = mixture.lane(index, mixture.start()), 0
    try:
        while lane.next_sample() is not None:
            count += 1
    finally:
        lane.close()
    return count
