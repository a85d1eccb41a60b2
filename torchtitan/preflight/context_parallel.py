"""Checks of context parallelism. No torch."""

import math
from collections.abc import Iterator

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import model_args
from torchtitan.preflight.tensor_parallel import model_problems

DEGREE_KEY = "parallelism.context_parallel_degree"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Return problems of `parallelism.context_parallel_*`."""
    section = context.config.parallelism
    degree, args = section.context_parallel_degree, model_args(context.config.model)
    if degree == 1 or args is None:
        return []
    heads = args.heads()
    if heads is None:
        problem = "this model's attention cannot be spread over ranks"
        return [ConfigIssue(DEGREE_KEY, problem, "set it to 1", degree)]
    if model_problems(context, args):
        return []  # of a degree of tensor parallelism that is none, nothing follows
    problems = _heads(context, *heads) if section.context_parallel_method == "ulysses" else []
    if not problems:
        problems += _sequence(context)
    if context.device_type == "cuda" and section.context_parallel_method != "ulysses":
        problems += _slow(context, args.attention_window())
    return problems


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
    problem = (
        f"where {where} it has no kernel on CUDA, and computes attention from the formula, in"
        " float32: right, and many times slower"
    )
    fix = f"set it to ulysses, which has one, {instead}"
    key = "parallelism.context_parallel_method"
    yield ConfigIssue(key, problem, fix, method, severity="warning")


def _sequence(context: RunContext) -> list[ConfigIssue]:
    section, seq_len = context.config.parallelism, context.config.training.seq_len
    degree, tensor_degree = section.context_parallel_degree, section.tensor_parallel_degree
    balanced = (
        section.context_parallel_load_balancer == "headtail"
        and section.context_parallel_method != "ulysses"
    )
    # Each rank's share is cut in two for balance, and over the ranks of tensor parallelism.
    divisor = degree * math.lcm(2 if balanced else 1, tensor_degree)
    if seq_len % divisor == 0:
        return []
    above = -(-seq_len // divisor) * divisor
    nearest = f"{above - divisor} or {above}" if above > divisor else str(above)
    degrees = f"context_parallel_degree = {degree} needs"
    if tensor_degree > 1:
        degrees = f"context_parallel_degree = {degree} and"
        degrees += f" tensor_parallel_degree = {tensor_degree} need"
    problem = f"{degrees} a multiple of {divisor}"
    return [ConfigIssue("training.seq_len", problem, f"set it to {nearest}", seq_len)]


def _heads(context: RunContext, heads: int, kv_heads: int) -> list[ConfigIssue]:
    """Ulysses gives each rank whole heads; of keys and values several ranks may share one."""
    section = context.config.parallelism
    degree, tensor_degree = section.context_parallel_degree, section.tensor_parallel_degree
    heads, kv_heads = heads // tensor_degree, max(1, kv_heads // tensor_degree)

    def fits(ranks: int) -> bool:
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    if fits(degree):
        return []
    possible = ", ".join(str(ranks) for ranks in range(1, heads + 1) if fits(ranks))
    of_rank = " on a rank of tensor parallelism" if tensor_degree > 1 else ""
    return [
        ConfigIssue(
            DEGREE_KEY,
            f"ulysses cannot share out {heads} heads of queries and {kv_heads} of keys and values"
            f"{of_rank}",
            f"set it to one of {possible}, or context_parallel_method to allgather or ring",
            degree,
        )
    ]
