"""What can be wrong with the settings of context parallelism. No torch."""

import math
from collections.abc import Iterator

from torchtitan.config.errors import Problem
from torchtitan.config.facts import Facts
from torchtitan.distributed.tensor_checks import model_problems
from torchtitan.models.checks import model_args

DEGREE_KEY = "parallelism.context_parallel_degree"


def check(facts: Facts) -> list[Problem]:
    """Problems of `parallelism.context_parallel_*`."""
    section = facts.config.parallelism
    degree, args = section.context_parallel_degree, model_args(facts)
    if degree == 1 or args is None:
        return []
    heads = args.heads()
    if heads is None:
        problem = "this model's attention cannot be spread over ranks"
        return [Problem(DEGREE_KEY, problem, "set it to 1", degree)]
    if model_problems(facts, args):
        return []  # of a degree of tensor parallelism that is none, nothing follows
    problems = _heads(facts, *heads) if section.context_parallel_method == "ulysses" else []
    if not problems:
        problems += _sequence(facts)
    if facts.device_type == "cuda" and section.context_parallel_method != "ulysses":
        problems += _slow(facts, args.attention_window())
    return problems


def _slow(facts: Facts, window: int | None) -> Iterator[Problem]:
    """What `attention_kernels` has no kernel for."""
    training = facts.config.training
    method = facts.config.parallelism.context_parallel_method
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
    yield Problem(key, problem, fix, method, severity="warning")


def _sequence(facts: Facts) -> list[Problem]:
    section, seq_len = facts.config.parallelism, facts.config.training.seq_len
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
    return [Problem("training.seq_len", problem, f"set it to {nearest}", seq_len)]


def _heads(facts: Facts, heads: int, kv_heads: int) -> list[Problem]:
    """Ulysses gives each rank whole heads; of keys and values several ranks may share one."""
    section = facts.config.parallelism
    degree, tensor_degree = section.context_parallel_degree, section.tensor_parallel_degree
    heads, kv_heads = heads // tensor_degree, max(1, kv_heads // tensor_degree)

    def fits(ranks: int) -> bool:
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    if fits(degree):
        return []
    possible = ", ".join(str(ranks) for ranks in range(1, heads + 1) if fits(ranks))
    of_rank = " on a rank of tensor parallelism" if tensor_degree > 1 else ""
    return [
        Problem(
            DEGREE_KEY,
            f"ulysses cannot share out {heads} heads of queries and {kv_heads} of keys and values"
            f"{of_rank}",
            f"set it to one of {possible}, or context_parallel_method to allgather or ring",
            degree,
        )
    ]
