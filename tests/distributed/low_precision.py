"""Small Llamas whose linears compute in another format, trained for some steps on some mesh."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed import tiny
from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.faults.saving import find, make_store
from tests.parity.table import row
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors, plain_tensor
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.batch import Batch
from torchtitan.optim.lr_scheduler import lr_factor, set_learning_rates
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.parallel.grad_clip import clip_gradients
from torchtitan.training import builder, model_builder

NUM_TARGETS = 100
SENT_IN_FLOAT8 = {
    "enable_fsdp_float8_all_gather": True,
    "precompute_float8_dynamic_scale_for_fsdp": True,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensorwise": ("float8", {}),
    "rowwise": ("float8", {"recipe_name": "rowwise"}),
    "rowwise_with_gw_hp": ("float8", {"recipe_name": "rowwise_with_gw_hp"}),
    "sent in float8": ("float8", SENT_IN_FLOAT8),
    "emulated": ("float8", {"emulate": True}),
    "int8": ("int8", {}),
    "bitnet": ("bitnet", {}),
    "mxfp8 emulated": ("mxfp8", {"recipe_name": "mxfp8_emulated"}),
}
"""The handler and its settings."""
FULL_PRECISION: dict[str, tuple[str, dict[str, Any]]] = {
    "freeze": ("freeze", {"patterns": ["tok_embeddings.*", "layers.0.*"]}),
    "compile": ("compile", {"backend": "aot_eager"}),
}
"""The other ones, that change no linear."""


def case_of(
    variant: str | None,
    *settings: dict[str, dict[str, Any]],
    compiled: bool = False,
    debug_model: bool = False,
    **mesh: Any,
) -> Case:
    """A row of the parity table in bfloat16, wide enough for parts of matrices in multiples of 16
    or, for mxfp8, 32; or the debug model. Without a variant: plain linears."""
    handlers: list[str] = []
    tables: dict[str, Any] = {}
    if variant is not None:
        name, table = (VARIANTS | FULL_PRECISION)[variant]
        handlers, tables = [name], {name: table}
    if compiled:
        handlers, tables = [*handlers, "compile"], {**tables, "compile": {"backend": "aot_eager"}}
    args = {"dim": 64, "ffn_dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    args = {} if debug_model else args
    sections = {
        "model": {"args": args, "handlers": handlers},
        "handlers": tables,
        "training": {
            "dtype": "float32",
            "mixed_precision_param": "bfloat16",
            "mixed_precision_reduce": "float32",
            "loss_chunks": 1,
        },
        "optimizer": {"lr": 3e-3},
        "parallelism": {"pipeline_parallel_microbatch_size": 4},
    }
    return row(sections, *settings, **mesh)


@dataclass
class Trained:
    """What a rank saw."""

    losses: list[float] = field(default_factory=list)
    names: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What a checkpoint holds of the model on this rank: whole shapes by name."""
    kinds: set[str] = field(default_factory=set)
    """Classes of the linears of the blocks."""
    num_graphs: int = 0
    scales: list[bool] = field(default_factory=list)
    """Of weights that FSDP sends in float8: whether each has the scale of the whole matrix, known
    before it is gathered, when it was loaded and after the last step."""


def train(
    world: DistributedContext, case: Case, steps: int, folder: str = "", save: bool = False
) -> Trained:
    """Some steps as the loop makes them, from the checkpoint in `folder` if there is one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, VOCAB_SIZE, mesh, dims, world.device)
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    tensors = {**model_tensors(model.parts), **optimizer_tensors(model.parts, optimizers)}
    store = make_store(world, folder) if folder else None
    if store is not None and (found := find(store)) is not None:
        store.load(found, tensors)
    model_builder.call_after_load(model)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    update = builder.build_update(config, model, optimizers, dims)
    batches = tiny.microbatches_of(case, dims, world.rank)
    trained = Trained()
    known = _known_scales(model.parts)
    for _ in range(steps):
        trained.losses.append(runner.forward_backward(batches, NUM_TARGETS).item())
        is_finite = torch.isfinite(update.gradient_norm())
        for handler in model.handlers:
            handler.pre_optimizer_hook(model.part_or_parts)
        update.step(is_finite)
        for handler in model.handlers:
            handler.post_optimizer_hook(model.part_or_parts)
        for optimizer in optimizers:
            optimizer.zero_grad()
    trained.scales = [a and b for a, b in zip(known, _known_scales(model.parts), strict=True)]
    if save:
        assert store is not None
        store.save(steps, tensors, {})
    held = model_tensors(model.parts)
    assert {type(_local(tensor)) for tensor in held.values()} <= {Tensor}
    trained.names = {name: tuple(tensor.shape) for name, tensor in held.items()}
    blocks = [block for part in model.parts for block in part.blocks().values()]  # type: ignore[operator]
    linears = [module for block in blocks for module in block.modules()]
    trained.kinds = {type(module).__name__ for module in linears if isinstance(module, nn.Linear)}
    trained.num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return trained


def _known_scales(parts: Iterable[nn.Module]) -> list[bool]:
    found = []
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        local = getattr(parameter, "_local_tensor", None)  # `to_local` would lose the scale
        if hasattr(local, "fsdp_pre_all_gather"):
            scale = local._precomputed_scale  # type: ignore[union-attr]
            largest = plain_tensor(parameter.detach()).full_tensor().abs().max()  # type: ignore[operator]
            expected = torch.finfo(torch.float8_e4m3fn).max / largest.double()
            found.append(scale is not None and scale.item() == expected.float().item())
    return found


# What rounding costs

CURVE_STEPS = 200
_CURVE_LENGTH = 32


@dataclass(frozen=True)
class Curve:
    """Losses of a run on text."""

    losses: list[float]

    @property
    def last(self) -> float:
        """The mean of the last 10 steps."""
        return sum(self.losses[-10:]) / 10


def text_batches(count: int, sequences: int, length: int) -> list[Batch]:
    """Bytes of the standard library, as the debug model's data are; the same each time."""
    import argparse
    import asyncio.base_events
    import typing

    text = b"".join(
        Path(module.__file__).read_bytes() for module in (typing, argparse, asyncio.base_events)
    )
    size = sequences * length
    assert len(text) > count * size
    batches = []
    for start in range(0, count * size, size):
        chunk = torch.tensor(list(text[start : start + size + 1]), dtype=torch.int64)
        tokens, labels = chunk[:-1].view(sequences, length), chunk[1:].view(sequences, length)
        positions = torch.arange(length).repeat(sequences, 1)
        batches.append(Batch(tokens=tokens, labels=labels, positions=positions))
    return batches


def curve(world: DistributedContext, variant: str | None) -> Curve:
    """The debug model on short sequences of text, the same for every variant."""
    sections = {
        "training": {"seq_len": _CURVE_LENGTH, "global_batch_size": 4, "local_batch_size": 4},
        "optimizer": {"lr": 3e-3},
        "lr_scheduler": {"warmup_steps": 20},
    }
    config = case_of(variant, sections, debug_model=True).config()
    dims = ParallelDims()
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, 256, mesh, dims, world.device)
    optimizers = build_optimizers(config.optimizer, model.parts, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    update = builder.build_update(config, model, optimizers, dims)
    losses = []
    for step, batch in enumerate(text_batches(CURVE_STEPS, 4, _CURVE_LENGTH), 1):
        lr = config.optimizer.lr * lr_factor(step, CURVE_STEPS, config.lr_scheduler)
        set_learning_rates(optimizers, lr)
        losses.append(runner.forward_backward([batch], batch["labels"].numel()).item())
        norm = update.gradient_norm()
        clip_gradients(model.parameters, norm, 1.0)
        update.step(torch.isfinite(norm))
        for handler in model.handlers:
            handler.post_optimizer_hook(model.part_or_parts)
        for optimizer in optimizers:
            optimizer.zero_grad()
    return Curve(losses)


@dataclass(frozen=True)
class GradientError:
    """Against float32: the norm of the difference, over the norm of the gradient."""

    all: float
    worst: float
    """Of a single matrix in a block."""


def gradient_errors(world: DistributedContext) -> dict[str, GradientError]:
    """Of the debug model's first step on text, for bfloat16 and every variant."""
    [batch] = text_batches(1, 8, _CURVE_LENGTH)
    reference = _gradients(world, None, batch, "float32")
    errors = {}
    for variant in (None, *VARIANTS):
        found = _gradients(world, variant, batch, "bfloat16")
        differences = {name: found[name] - whole for name, whole in reference.items()}
        total = _norm(differences.values()) / _norm(reference.values())
        matrices = [n for n, whole in reference.items() if n[:6] == "layers" and whole.ndim > 1]
        worst = max(_norm([differences[name]]) / _norm([reference[name]]) for name in matrices)
        errors[variant or "bfloat16"] = GradientError(total, worst)
    return errors


def _gradients(
    world: DistributedContext, variant: str | None, batch: Batch, dtype: str
) -> dict[str, Tensor]:
    sections = {"training": {"seq_len": _CURVE_LENGTH, "mixed_precision_param": dtype}}
    config = case_of(variant, sections, debug_model=True).config()
    dims = ParallelDims()
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, 256, mesh, dims, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    runner.forward_backward([batch], batch["labels"].numel())
    named = dict(model.parts[0].named_parameters())
    assert all(parameter.grad is not None for parameter in named.values())
    return {name: _local(parameter.grad).float() for name, parameter in named.items()}  # type: ignore[arg-type]


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
