"""What handlers that make linears compute in another format have in common. No torch."""

from collections.abc import Iterator

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Names, Section


class LinearSettings(Section):
    """Which linears."""

    filter_fqns: Names = ()
    """Linears whose full name contains one of these texts stay as they are. The head is none of
    them: it is computed together with the loss, in `training.mixed_precision_param`."""


def no_float64(context: RunContext, handler: str) -> Iterator[ConfigIssue]:
    """The kernels' results have 16 or 32 bits."""
    dtype = context.config.training.mixed_precision_param
    if dtype == "float64":
        problem = f"the handler {handler} multiplies in types of at most 32 bits"
        yield ConfigIssue("training.mixed_precision_param", problem, 'set it to "bfloat16"', dtype)


def whole_blocks(
    context: RunContext, handler: str, multiple: int, why: str
) -> Iterator[ConfigIssue]:
    """Gradients of weights are products along the tokens of a microbatch."""
    config = context.config
    size = config.training.local_batch_size
    if config.parallelism.pipeline_parallel_degree > 1:
        size = config.parallelism.pipeline_parallel_microbatch_size
    tokens = size * config.training.seq_len // config.parallelism.context_parallel_degree
    if tokens % multiple:
        problem = (
            f"a rank's microbatch of {size} x {config.training.seq_len} tokens"
            f" (context_parallel_degree = {config.parallelism.context_parallel_degree}) has"
            f" {tokens}, and the handler {handler} needs a multiple of {multiple}: {why}"
        )
        fix = f"set it to a multiple of {multiple * config.parallelism.context_parallel_degree}"
        yield ConfigIssue("training.seq_len", problem, fix, config.training.seq_len)


def needs_capability(
    context: RunContext, handler: str, least: tuple[int, int], device: str, instead: str
) -> Iterator[ConfigIssue]:
    """GPUs before the one called `device` lack the units. Imports torch; AMD's number otherwise."""
    import torch

    from torchtitan.utils.environment import EnvironmentFaults, read_environment

    if context.device_type != "cuda" or torch.version.hip is not None:
        return
    try:
        local_rank = read_environment().local_rank
    except EnvironmentFaults:
        return  # `--check` of another machine's world size
    if local_rank >= torch.cuda.device_count():
        return  # reported with the devices
    found = torch.cuda.get_device_capability(local_rank)
    if found < least:
        problem = (
            f"the GPU has compute capability {found[0]}.{found[1]}, and it needs"
            f" {least[0]}.{least[1]} ({device})"
        )
        yield ConfigIssue("model.handlers", problem, instead, handler)
