"""Sections about the run itself: where it writes, on what it runs, how its processes talk."""

from typing import Annotated, Literal

from pydantic import Field

from torchtitan.config.paths import PathText
from torchtitan.config.section import Names, NonNegativeInt, PositiveInt, Section

MAX_SEED = 2**63 - 1
MAX_TRACE_ENTRIES = 2**31 - 1


class Job(Section):
    config_file: PathText | None = None
    """TOML file of the run. Values on the command line win over it."""

    dump_folder: PathText = "./outputs"
    """The run folder: everything the run writes lies below it."""

    description: str = "default job"
    """What the run is, in words, for the log and for whoever finds the folder."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. `auto` takes CUDA when there is a GPU, else the CPU."""

    print_config: bool = False
    """Log the resolved config at the start."""

    new_run: bool = False
    """Start afresh in a folder that holds another run; the old folder's content is moved aside."""

    custom_import: Names = ()
    """Modules to import before the config is checked, to register models, handlers, datasets,
    tokenizers, losses, optimizers, schedules, masks or sinks of metrics."""


class Comm(Section):
    mode: Literal["default", "fake_backend"] = "default"
    """`fake_backend` is a dry run: one step as one rank (RANK) of WORLD_SIZE in this process alone, on
    tensors without memory and without communication, to find what would fail at scale."""

    init_timeout_seconds: PositiveInt = 300
    """Seconds that a collective may take before the first step has been trained."""

    train_timeout_seconds: PositiveInt = 100
    """Seconds that a collective may take after the first step; a lost rank is noticed by then."""

    trace_buf_size: Annotated[int, Field(ge=0, le=MAX_TRACE_ENTRIES)] = 20000
    """Newest collectives that each rank remembers, to be written when one of them times out or
    fails; 0 remembers none."""

    save_traces_folder: str = "comm_traces"
    """Folder of these records of collectives, below `job.dump_folder`."""

    save_traces_file_prefix: str = "rank_"
    """Start of their files' names; the rank follows."""


class Debug(Section):
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of the initial weights and of the order of the data. The same on every mesh."""

    deterministic: bool = False
    """Use deterministic algorithms only (slower on GPUs)."""

    deterministic_warn_only: bool = False
    """With `deterministic`: warn about operations that have no deterministic form, do not fail."""

    cpu_allocator: Literal["tuned", "system"] = "tuned"
    """On the CPU, `tuned` raises glibc's mmap and trim thresholds, `system` leaves them alone."""

    threads: NonNegativeInt = 0
    """Threads of a process's CPU operators; 0 divides a machine's cores among its processes."""
