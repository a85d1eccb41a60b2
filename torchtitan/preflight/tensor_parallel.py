"""Checks of tensor parallelism. No torch."""

from collections.abc import Iterator

from torchtitan.config.errors import ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import model_args
from torchtitan.models.spec import ModelArgs
from torchtitan.utils.environment import EnvironmentFaults, read_environment

DEGREE_KEY = "parallelism.tensor_parallel_degree"
ASYNC_KEY = "parallelism.enable_async_tensor_parallel"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Return issues of the degree and of `enable_async_tensor_parallel`."""
    section = context.config.parallelism
    degree, args = section.tensor_parallel_degree, model_args(context.config.model)
    issues = list(_async(context)) if section.enable_async_tensor_parallel else []
    if degree > 1 and args is not None:
        issues += [*model_problems(context, args), *_machines(context)]
    return issues


def model_problems(context: RunContext, args: ModelArgs) -> list[ConfigIssue]:
    """Return the reasons why a model of these hyper-parameters cannot be sharded."""
    degree = context.config.parallelism.tensor_parallel_degree
    if degree == 1:
        return []
    issues = args.tensor_parallel_problems(degree)
    return issues or list(_uneven_vocabulary(context, args))


def _uneven_vocabulary(context: RunContext, args: ModelArgs) -> Iterator[ConfigIssue]:
    """Return a problem of an uneven vocabulary.

    Matrices whose rows are cut unevenly are sharded by columns, see `data_parallel`, and FSDP
    needs an even number per rank.
    """
    section = context.config.parallelism
    degree, vocab_size = section.tensor_parallel_degree, args.vocab_size
    shards = context.shard_degree * section.context_parallel_degree
    if vocab_size is None or vocab_size % degree == 0 or args.hidden_size() % shards == 0:
        return
    problem = (
        f"cuts the vocabulary's {vocab_size} tokens unevenly, so that the embedding's width,"
        f" {args.hidden_size()}, has to be sharded; but data_parallel_shard_degree x"
        f" context_parallel_degree = {shards} does not divide it"
    )
    fix = f"set model.args.vocab_size to a multiple of {degree}, above the tokenizer's size"
    yield ConfigIssue(DEGREE_KEY, problem, fix, degree)


def _async(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    backend = config.handlers.get("compile", {}).get("backend", "inductor")
    fix = "set it to false"
    if config.parallelism.tensor_parallel_degree == 1:
        yield ConfigIssue(ASYNC_KEY, f"{DEGREE_KEY} is 1: nothing is exchanged", fix, True)
    elif context.device_type != "cuda":
        problem = f"it needs CUDA devices, and this run is on {context.device_type}"
        yield ConfigIssue(ASYNC_KEY, problem, fix, True)
    elif "compile" not in config.model.handlers or backend != "inductor":
        problem = "it is the compiler that overlaps products and their communication"
        fix = 'add "compile" to model.handlers, with the backend inductor, or set this to false'
        yield ConfigIssue(ASYNC_KEY, problem, fix, True)


def _machines(context: RunContext) -> Iterator[ConfigIssue]:
    try:
        environment = read_environment()
    except EnvironmentFaults:
        return  # reported where processes are joined
    degree, local = context.config.parallelism.tensor_parallel_degree, environment.local_world_size
    if context.full and environment.world_size == context.world_size > local and local % degree:
        text = "some ranks that exchange activations in every layer are on different machines"
        fix = f"set it to a divisor of the {local} processes of a machine"
        yield warning(DEGREE_KEY, text, fix, degree)
