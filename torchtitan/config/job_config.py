"""`JobConfig`: all sections of a run."""

from typing import Any

from pydantic import Field

from torchtitan.config.model_sections import ActivationCheckpoint, Model
from torchtitan.config.output_sections import Checkpoint, Metrics, Profiling
from torchtitan.config.parallelism_section import Parallelism
from torchtitan.config.run_sections import Comm, Debug, Job
from torchtitan.config.section import Section
from torchtitan.config.training_sections import Data, Loss, LRScheduler, Optimizer, Training
from torchtitan.config.validation_section import Validation


class JobConfig(Section):
    job: Job = Field(default_factory=Job)
    """The run: where it writes and on what it runs."""

    model: Model = Field(default_factory=Model)
    """The model and its tokenizer."""

    handlers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of the model handlers, one table each; every handler checks its own."""

    training: Training = Field(default_factory=Training)
    """Batch, sequence length, steps, precision."""

    data: Data = Field(default_factory=Data)
    """How documents become sequences."""

    loss: Loss = Field(default_factory=Loss)
    """What is minimised; `training.loss_chunks` says in how many parts it is computed."""

    optimizer: Optimizer = Field(default_factory=Optimizer)
    """Optimizer and parameter groups."""

    lr_scheduler: LRScheduler = Field(default_factory=LRScheduler)
    """How the learning rate changes: by default warmup, stable phase, decay."""

    parallelism: Parallelism = Field(default_factory=Parallelism)
    """The mesh: how many processes train, and how the model is cut over them."""

    activation_checkpoint: ActivationCheckpoint = Field(default_factory=ActivationCheckpoint)
    """Recompute activations in the backward to save memory."""

    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """Saving and resuming."""

    validation: Validation = Field(default_factory=Validation)
    """Loss on data that are not trained on."""

    metrics: Metrics = Field(default_factory=Metrics)
    """Logging."""

    sinks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of the places in `metrics.sinks`, one table each; every sink checks its own."""

    profiling: Profiling = Field(default_factory=Profiling)
    """Profiler traces."""

    comm: Comm = Field(default_factory=Comm)
    """Communication between processes."""

    debug: Debug = Field(default_factory=Debug)
    """Seed, determinism, process set-up."""
