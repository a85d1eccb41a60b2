"""Sections about what a run leaves behind: checkpoints, metrics, profiler traces."""

from typing import Literal

from pydantic import Field

from torchtitan.config.paths import PathText
from torchtitan.config.section import Names, NonNegativeInt, PositiveFloat, PositiveInt, Section


class Checkpoint(Section):
    enable: bool = False
    """Save checkpoints, and resume from the newest good one."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, below `job.dump_folder`."""

    interval: PositiveInt = 500
    """Steps between two checkpoints."""

    keep_latest_k: NonNegativeInt = 10
    """Checkpoints to keep, at least 2; 0 keeps all."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write checkpoints while training goes on, from copies in host memory. `async` makes the
    copies before the next step; `async_with_pinned_mem` makes them beside it on a GPU, and keeps
    the memory between saves."""

    enable_first_step_checkpoint: bool = False
    """Save after step 1, too, to see early that saving works."""

    load_step: int = Field(default=-1, ge=-1, le=2**63 - 1)
    """Step to resume from; -1 is the newest good one."""

    last_save_model_only: bool = False
    """Save only the model at the last step: smaller, but the run cannot be continued from there."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights that `last_save_model_only` saves; `float32` leaves them in
    theirs. `float16` holds nothing beyond 65504."""

    load_only: bool = False
    """Load as usual, and save nothing."""

    create_seed_checkpoint: bool = False
    """Save the initial weights as step 0, with one process, and end. A run on any mesh, in the same
    `job.dump_folder`, then starts from them."""

    initial_load_path: PathText | None = None
    """Folder of the checkpoint that a new run starts from: a `step-N`, or weights that
    `torch.distributed.checkpoint` saved. Once the run has checkpoints of its own, they count."""

    initial_load_model_only: bool = True
    """Take only the weights from `initial_load_path`. Else the optimizer's state, the step and the
    place in the data come along."""

    exclude_from_loading: Names = ()
    """What to leave at its start although `initial_load_path` has it: any of `optimizer`,
    `lr_scheduler`, `dataloader`, `train_state`, `handlers`. Needs
    `initial_load_model_only = false`."""

    allow_rewind: bool = False
    """Resume from `load_step` although later checkpoints exist; those are moved aside."""

    allow_dataset_change: bool = False
    """Resume although the data files or the tokenizer differ from those the run was trained on. A
    part of the epoch is then read twice, and a part not at all; `data.restart` avoids that."""

    allow_low_disk: bool = False
    """Start, with a warning, although the disk has no room for the next checkpoint, in bytes or in
    files: for file systems that do not tell the truth about it. A save that fails ends the run."""

    trust_path: bool = False
    """Use the checkpoint folder although anybody on the machine may write to it."""


class Metrics(Section):
    log_freq: PositiveInt = 10
    """Steps between two logged lines."""

    peak_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s, dense, in the type that computes: what the model FLOPs
    utilisation (MFU) is a share of. Unset: the maker's bfloat16 figure, for devices that are in the
    table of `utils/hardware.py`; others have no MFU."""

    enable_tensorboard: bool = False
    """Write TensorBoard event files."""

    save_tb_folder: str = "tb"
    """Folder of the event files, below `job.dump_folder`."""

    enable_wandb: bool = False
    """Log to Weights & Biases, too; needs the package `wandb`. WANDB_PROJECT, WANDB_TEAM,
    WANDB_RUN_NAME and WANDB_MODE say where and as what."""

    sinks: Names = ()
    """Further places to log to, by the names that packages or modules of your own register
    (`torchtitan list sinks`); each has its settings in `[sinks.NAME]`."""

    save_for_all_ranks: bool = False
    """Every rank writes its own metrics, and event files in a folder `rank_N`; else rank 0 alone
    does."""

    disable_color_printing: bool = False
    """Plain console output without colours or progress bar."""


class Profiling(Section):
    enable_profiling: bool = False
    """Write Chrome (Perfetto) traces of some steps."""

    save_traces_folder: str = "profile_trace"
    """Folder of the traces, below `job.dump_folder`."""

    profile_freq: PositiveInt = 10
    """Steps between the ends of two traces, and between two memory snapshots."""

    profiler_active: PositiveInt = 1
    """Steps in a trace."""

    profiler_warmup: NonNegativeInt = 3
    """Steps before a trace in which the profiler runs without recording."""

    enable_memory_snapshot: bool = False
    """Write snapshots of the GPU's memory, with the history of its blocks, each `profile_freq`
    steps and when memory runs out. CUDA only."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, below `job.dump_folder`."""
