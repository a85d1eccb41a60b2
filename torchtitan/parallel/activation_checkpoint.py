"""Activation checkpointing: drop a block's activations, recompute them in the backward.

A block's `forward` is replaced by a closure, in place, so that parameter names stay. `full` keeps
only the input of every block. `selective` either does that to every n-th block, or works by
operator: what is dear to compute and small to keep (attention, every second matrix product) is kept
in every block, and the rest, which is cheap, is computed again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torchtitan.models.document_attention  # noqa: F401  (registers an operator named below)
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.parallel.compile import is_marked_for_compile
from torchtitan.parallel.token_dropout import TokenDropout, token_dropouts

_ATEN = torch.ops.aten
_MATRIX_PRODUCTS = frozenset([_ATEN.mm.default, _ATEN.addmm.default, _ATEN.linear.default])
_KEPT = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    torch.ops.torchtitan.document_attention.default,
    torch.ops.higher_order.flex_attention,  # in compiled blocks; elsewhere it is not seen
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}


def keep_in_checkpoints(operator: torch._ops.OpOverload) -> None:
    """Let checkpointing by operator keep what this one returns."""
    _KEPT.add(operator)


def apply_activation_checkpoint(
    blocks: Mapping[str, nn.Module], section: ActivationCheckpoint
) -> None:
    """Replace the forward of the blocks that `section` names."""
    if section.mode in ("none", "memory_budget"):  # `compile.py` does the latter
        return
    _require_rng_state(blocks, section)
    by_operator = section.mode == "selective" and section.selective_ac_option == "op"
    every = 1 if section.mode == "full" or by_operator else int(section.selective_ac_option)
    arguments: dict[str, Any] = {"preserve_rng_state": section.preserve_rng_state}
    if by_operator:
        arguments["context_fn"] = _operator_contexts
    for number, block in enumerate(blocks.values(), start=1):
        if number % every == 0:
            is_trained = any(parameter.requires_grad for parameter in block.parameters())
            by_block = arguments
            # A compiled graph keeps what it has read; it cannot take these contexts.
            if (dropouts := token_dropouts(block)) and not is_marked_for_compile(block):
                contexts = partial(_token_contexts, dropouts, arguments.get("context_fn"))
                by_block = {**arguments, "context_fn": contexts}
            block.forward = _checkpointed(block.forward, by_block, is_trained)


def _require_rng_state(blocks: Mapping[str, nn.Module], section: ActivationCheckpoint) -> None:
    """Refuse dropout whose mask would be another one when it is computed again."""
    for block_name, block in blocks.items() if not section.preserve_rng_state else ():
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, _DropoutNd) and module.p > 0:
                problem = f"{name} is a dropout, and its mask would not be that of the forward"
                key, fix = "activation_checkpoint.preserve_rng_state", "set it to true"
                raise ConfigError(ConfigIssue(key, problem, fix, value=False))


def _checkpointed(
    forward: Callable[..., Any], arguments: dict[str, Any], is_trained: bool
) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        # No backward comes to a frozen block behind frozen ones, and the compiler cannot take it.
        if not is_trained and not args[0].requires_grad:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **arguments, **kwargs)

    return recomputed


def _token_contexts(
    dropouts: Sequence[TokenDropout], inner: Callable[[], Any] | None
) -> tuple[Any, Any]:
    """Return the contexts of a forward, whose tokens the second one, its recomputation, sees again.

    Meanwhile a pipeline may have begun another microbatch.
    """
    forward, recompute = (nullcontext(), nullcontext()) if inner is None else inner()
    return forward, _tokens_again(recompute, [(dropout, dropout.rows) for dropout in dropouts])


@contextmanager
def _tokens_again(
    inner: AbstractContextManager[Any], then: Sequence[tuple[TokenDropout, Tensor | None]]
) -> Iterator[None]:
    now = [(dropout, dropout.rows) for dropout, _ in then]
    for dropout, rows in then:
        dropout.rows = rows
    try:
        with inner:
            yield
    finally:
        for dropout, rows in now:
            dropout.rows = rows


def _operator_contexts() -> Any:
    # A function of the module, because compiled code can not take a nested one; counters anew for
    # every forward, one for it and one for its recomputation, which must decide alike.
    counts: dict[str, int] = {"forward": 0, "recompute": 0}
    return create_selective_checkpoint_contexts(partial(_keep_or_recompute, counts))


def _keep_or_recompute(
    counts: dict[str, int], context: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if operator in _KEPT and not _draws(operator, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    if operator in _MATRIX_PRODUCTS:
        phase = "recompute" if context.is_recompute else "forward"
        counts[phase] += 1
        if counts[phase] % 2 == 1:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an attention has dropout.

    If its result were kept, later modules of the block would draw different random numbers in the
    recomputation.
    """
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in operator._schema.arguments]
    return bool({**dict(zip(names, args)), **kwargs}.get("dropout_p"))
