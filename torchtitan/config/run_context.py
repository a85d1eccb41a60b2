"""`RunContext`: a config, the processes it will run on, and quantities that follow from both."""

from dataclasses import dataclass

from torchtitan.config.fitting import fitted
from torchtitan.config.schema import JobConfig
from torchtitan.utils.text import plural

MAX_DEFAULT_LANES = 64


@dataclass(frozen=True)
class RunContext:
    """A config, the number of processes, and values that follow from both.

    Properties resolve what a config may leave open. Defaults that do not fit the rest of the config
    are adjusted. `full`: this machine will train, so its hardware and files are checked.
    """

    config: JobConfig
    world_size: int
    device_type: str
    full: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", fitted(self.config, self.dp_degree))

    @property
    def other_degrees(self) -> int:
        """Product of the degrees of everything but data parallelism."""
        mesh = self.config.parallelism
        return (
            mesh.tensor_parallel_degree
            * mesh.context_parallel_degree
            * mesh.pipeline_parallel_degree
        )

    @property
    def shard_degree(self) -> int:
        """Ranks that share one copy of the parameters; -1 resolved, at least 1."""
        mesh = self.config.parallelism
        if mesh.data_parallel_shard_degree > 0:
            return mesh.data_parallel_shard_degree
        rest = self.world_size // (mesh.data_parallel_replicate_degree * self.other_degrees)
        return max(1, rest)

    @property
    def dp_degree(self) -> int:
        """Ranks that read different data."""
        return self.config.parallelism.data_parallel_replicate_degree * self.shard_degree

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step over all ranks."""
        training = self.config.training
        if training.global_batch_size > 0:
            return training.global_batch_size
        return training.local_batch_size * self.dp_degree

    @property
    def num_lanes(self) -> int:
        """Independent data streams."""
        return self.config.data.lanes or default_lanes(self.global_batch_size)

    @property
    def warmup_steps(self) -> int | None:
        """Steps of the learning rate's warmup; None where the schedule is not the built-in one."""
        schedule = self.config.lr_scheduler
        if schedule.name != type(schedule).model_fields["name"].default:
            return None
        return schedule.warmup(schedule.length(self.config.training.steps))

    @property
    def accumulation_steps(self) -> int:
        """Microbatches per rank and step, at least 1."""
        local = self.config.training.local_batch_size * self.dp_degree
        return max(1, self.global_batch_size // local)

    @property
    def pipeline_microbatches(self) -> int:
        """Microbatches that a pipeline cuts a rank's sequences of a step into."""
        size = self.config.parallelism.pipeline_parallel_microbatch_size
        return self.accumulation_steps * self.config.training.local_batch_size // size

    def describe_batch(self) -> str:
        """Return the sequences of a step and of a rank's microbatches, in words."""
        mesh, training = self.config.parallelism, self.config.training
        count, size = self.accumulation_steps, training.local_batch_size
        if mesh.pipeline_parallel_degree > 1:
            count, size = self.pipeline_microbatches, mesh.pipeline_parallel_microbatch_size
        tokens = self.global_batch_size * training.seq_len
        return (
            f"{plural(self.global_batch_size, 'sequence')} x {training.seq_len:,} ="
            f" {plural(tokens, 'token')} a step, {plural(count, 'microbatch')} of {size} a rank"
        )


def default_lanes(global_batch_size: int) -> int:
    """Return the largest divisor of the global batch size up to 64."""
    candidates = range(min(MAX_DEFAULT_LANES, global_batch_size), 0, -1)
    return next(lanes for lanes in candidates if global_batch_size % lanes == 0)
