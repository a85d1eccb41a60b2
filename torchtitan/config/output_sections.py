"""Sections about what a run leaves behind: checkpoints, metrics, profiler traces."""

from pydantic import Field

from torchtitan.config.section import NonNegativeInt, PositiveInt, Section


class Checkpoint(Section):
    enable: bool = False
    """Save checkpoints, and resume from the newest good one."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, below `job.dump_folder`."""

    interval: PositiveInt = 500
    """Steps between two checkpoints."""

    keep_latest_k: NonNegativeInt = 10
    """Checkpoints to keep, at least 2; 0 keeps all."""

    load_step: int = Field(default=-1, ge=-1, le=2**63 - 1)
    """Step to resume from; -1 is the newest good one."""

    last_save_model_only: bool = False
    """Save only the model at the last step: smaller, but the run cannot be continued from there."""

    allow_rewind: bool = False
    """Resume from `load_step` although later checkpoints exist; those are moved aside."""

    allow_dataset_change: bool = False
    """Resume although the data files or the tokenizer differ from those the run was trained on."""

    trust_path: bool = False
    """Use the checkpoint folder although anybody on the machine may write to it."""


class Metrics(Section):
    log_freq: PositiveInt = 10
    """Steps between two logged lines."""

    enable_tensorboard: bool = False
    """Write TensorBoard event files."""

    save_tb_folder: str = "tb"
    """Folder of the event files, below `job.dump_folder`."""

    disable_color_printing: bool = False
    """Plain console output without colours or progress bar."""


class Profiling(Section):
    enable_profiling: bool = False
    """Write Chrome (Perfetto) traces of some steps."""

    save_traces_folder: str = "profile_trace"
    """Folder of the traces, below `job.dump_folder`."""

    profile_freq: PositiveInt = 10
    """Steps between the ends of two traces."""

    profiler_active: PositiveInt = 1
    """Steps in a trace."""

    profiler_warmup: NonNegativeInt = 3
    """Steps before a trace in which the profiler runs without recording."""
