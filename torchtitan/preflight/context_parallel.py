"""Checks of context parallelism. No torch."""

import math
from collections.abc import Iterator

from torchtitan.config.errors import ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import model_args
from torchtitan.preflight.tensor_parallel import model_problems

DEGREE_KEY = "parallelism.context_parallel_degree"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Return issues of `parallelism.context_parallel_*` and of a sequence that cannot be cut."""
    section = context.config.parallelism
    degree, args = section.context_parallel_degree, model_args(context.config.model)
    if args is None or model_problems(context, args):
        return []  # of a degree of tensor parallelism that is none, nothing follows
    if degree == 1:
        return _sequence(context)
    heads, ulysses = args.heads(), section.context_parallel_method == "ulysses"
    if heads is None:
        problem = "this model's attention cannot be spread over ranks"
        return [ConfigIssue(DEGREE_KEY, problem, "set it to 1", degree)]
    if ulysses:
        return _heads(context, *heads) or _sequence(context)
    slow = _slow(context, args.attention_window()) if context.device_type == "cuda" else ()
    return [*_sequence(context), *slow]


def _slow(context: RunContext, window: int | None) -> Iterator[ConfigIssue]:
    """Warn of attention that `attention_kernels` has no fast kernel for."""
    training = context.config.training
    method = context.config.parallelism.context_parallel_method
    if training.document_mask:
        where, instead = "documents meet (training.document_mask)", "or document_mask to false"
    elif window is not None and window < training.seq_len:
        where, instead = f"a window ends ({window} tokens)", "or use none"
    else:
        return
    problem = f"attention has no kernel on CUDA where {where}: it is right, and many times slower"
    fix = f"set it to ulysses, which has one, {instead}"
    yield warning("parallelism.context_parallel_method", problem, fix, method)


def sequence_divisor(context: RunContext) -> int:
    """Return the number of which the length of every batch must be a multiple."""
    section = context.config.parallelism
    degree, tensor_degree = section.context_parallel_degree, section.tensor_parallel_degree
    balanced = (
        degree > 1
        and section.context_parallel_load_balancer == "headtail"
        and section.context_parallel_method != "ulysses"
    )
    # Each rank's share is cut in two for balance, and over the ranks of tensor parallelism.
    return degree * math.lcm(2 if balanced else 1, tensor_degree)


def _sequence(context: RunContext) -> list[ConfigIssue]:
    section, seq_len = context.config.parallelism, context.config.training.seq_len
    divisor = sequence_divisor(context)
    if seq_len % divisor == 0:
        return []
    problem = (
        f"is not a multiple of {divisor}, as context_parallel_degree ="
        f" {section.context_parallel_degree} and tensor_parallel_degree ="
        f" {section.tensor_parallel_degree} need"
    )
    fix = f"set it to a multiple, such as {divisor * (seq_len // divisor + 1)}"
    return [ConfigIssue("training.seq_len", problem, fix, seq_len)]


def _heads(context: RunContext, heads: int, kv_heads: int) -> list[ConfigIssue]:
    """Ulysses gives each rank whole heads; of keys and values several ranks may share one."""
    section = context.config.parallelism
    degree, tensor_degree = section.context_parallel_degree, section.tensor_parallel_degree
    heads, kv_heads = heads // tensor_degree, max(1, kv_heads // tensor_degree)
    if heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0):
        return []
    problem = f"ulysses cannot share out {heads} heads of queries and {kv_heads} of keys and values"
    problem += " on a rank of tensor parallelism" if tensor_degree > 1 else ""
    fix = f"set it to a divisor of {kv_heads}, or context_parallel_method to allgather or ring"
    return [ConfigIssue(DEGREE_KEY, problem, fix, degree)]
