"""The section `[parallelism]`: over how many processes, and how, the model and its data are cut.

Whatever is set here changes speed and memory, and nothing else: not the initial weights, not the
data, not the loss.
"""

from typing import Annotated, Literal

from pydantic import Field

from torchtitan.config.paths import PathText
from torchtitan.config.section import Names, NonNegativeInt, PositiveInt, Section

Schedule = Literal[
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


class Parallelism(Section):
    data_parallel_replicate_degree: PositiveInt = 1
    """Copies of the model. With a shard degree of 1 this is DDP, above 1 it is HSDP."""

    data_parallel_shard_degree: int = Field(default=-1, ge=-1, le=2**31)
    """Ranks over which FSDP2 shards parameters, gradients and optimizer state; -1 takes all that
    are left."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after the forward: `always`, `never`, or `default` (always, but not
    with pipeline parallelism, where every microbatch would gather them again, and not on a single
    device, where `always` saves memory at the cost of some time)."""

    tensor_parallel_degree: PositiveInt = 1
    """Ranks over which single weight matrices, and the sequence between them, are cut."""

    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits of the whole vocabulary on every rank before the
    loss, instead of computing it on the cut vocabulary. Slower, and takes more memory."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor parallelism's communication with its matrix products, piece by piece. CUDA
    with the handler `compile` only."""

    context_parallel_degree: PositiveInt = 1
    """Ranks over which the sequence is cut."""

    context_parallel_method: Literal["allgather", "ring", "ulysses"] = "allgather"
    """How attention sees the whole sequence: `allgather` collects all keys and values at once,
    `ring` passes them from rank to rank and holds one rank's share at a time, `ulysses` exchanges
    sequence for heads (`allgather` and `ring` are TorchTitan's rotate methods `allgather` and
    `alltoall`)."""

    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """Which parts of the sequence a rank holds: with `headtail` one from its start and one from its
    end, so that causal attention costs every rank the same; with `none` one in order. Ulysses
    needs no balance and takes `none`."""

    pipeline_parallel_degree: PositiveInt = 1
    """Ranks over which the layers are cut into stages."""

    pipeline_parallel_schedule: Schedule = "1F1B"
    """Order of the forwards and backwards of a step's microbatches. GPipe and 1F1B have one stage
    per rank, ZBVZeroBubble and DualPipeV two, the others two or more."""

    pipeline_parallel_schedule_csv: PathText = ""
    """File with a schedule of one's own, a line per pipeline rank, in the format of
    torch.distributed.pipelining (without communication). It takes the place of
    `pipeline_parallel_schedule`."""

    pipeline_parallel_microbatch_size: PositiveInt = 1
    """Sequences of one pipeline microbatch; must divide `training.local_batch_size`. The schedule
    runs once a step, over all of its microbatches, those of gradient accumulation too."""

    pipeline_parallel_layers_per_stage: PositiveInt | None = None
    """Layers of a stage, which sets the number of stages; embedding and head count for a layer each
    in it, unless the two keys below say otherwise. Unset: one stage per rank for GPipe and 1F1B,
    two for the others."""

    pipeline_parallel_first_stage_less_layers: NonNegativeInt | None = None
    """Layers that the embedding counts for in a balanced cut. Unset: by its parameters."""

    pipeline_parallel_last_stage_less_layers: NonNegativeInt | None = None
    """Layers that the head counts for in a balanced cut. Unset: by its parameters."""

    module_fqns_per_model_part: Annotated[tuple[Names, ...], Field(strict=False)] = ()
    """The modules of every stage by name, instead of a balanced cut: `tok_embeddings`, `layers.0`,
    ..., `norm`, `output`, each in exactly one stage, in order."""

    pipeline_parallel_split_points: Names = ()
    """The modules at which a new stage begins, such as `layers.8`, instead of a balanced cut or of
    listing the modules of every stage."""
