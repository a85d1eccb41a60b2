"""Tensor parallelism with sequence parallelism: every matrix, and the sequence, cut over ranks.

Between the matrices a rank holds its part of the sequence, `[B, T/tp, D]`. Before a pair of
matrices the parts are gathered, `[B, T, D]`. The first matrix is cut by columns (of its output), so
that each rank has some heads or some hidden channels, whole; the second by rows (of its input), and
gives each rank a term of the sum, of which every rank is sent its part of the sequence. The
backward exchanges the same in reverse. Nothing is computed twice, and nothing scales a gradient.

A module sees plain tensors, which compile: its parameters are DTensors (which FSDP, checkpoints and
optimizers understand), but read as attributes they give this rank's part. Each module's class is
replaced by a subclass that does so, and that communicates around the forward; names stay.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from torchtitan.models.spec import LanguageModel
from torchtitan.parallel.compile import is_marked_for_compile
from torchtitan.parallel.tensor_plan_checks import plan_problems
from torchtitan.utils.torch_compat import enable_async_tensor_parallel

_C10D = torch.ops._c10d_functional


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share matrices, as plain values that compiled code can hold."""

    name: str
    size: int
    rank: int


def gather_sequence(x: Tensor, group: TensorGroup) -> Tensor:
    """`[B, T/tp, ...]` to `[B, T, ...]`; its gradient is summed over ranks and cut."""
    return _Gather.apply(x, group.name, group.size)


def reduce_scatter_sequence(x: Tensor, group: TensorGroup) -> Tensor:
    """`[B, T, ...]`, summed over ranks and cut, to `[B, T/tp, ...]`; its gradient is gathered."""
    return _Scatter.apply(x, group.name, group.size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        ctx.group = name, size
        return all_gather_parts(x, name, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_sum(grad, *ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        ctx.group = name, size
        return reduce_scatter_sum(x, name, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_parts(grad, *ctx.group), None, None


def all_gather_parts(x: Tensor, name: str, size: int) -> Tensor:
    """`gather_sequence`, of any type and without a gradient."""
    gathered = _C10D.wait_tensor(_C10D.all_gather_into_tensor(x.contiguous(), size, name))
    return torch.cat(gathered.chunk(size), dim=1)  # the collective appends along the batch


def reduce_scatter_sum(x: Tensor, name: str, size: int) -> Tensor:
    """`reduce_scatter_sequence`, without a gradient."""
    parts = torch.cat(x.chunk(size, dim=1))
    return _C10D.wait_tensor(_C10D.reduce_scatter_tensor(parts, "sum", size, name))


class CutModule(nn.Module):
    """The mixin of all sharded modules. Its `super()` is the module's own class."""

    group: TensorGroup
    _parts: dict[str, Tensor] | None = None
    """By name, this rank's parts of the parameters, during the forward of a compiled block."""


class GatherInput(CutModule):
    """A module whose first input is gathered along the sequence."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Gather `x`, `[B, T/tp, ...]`, and run the module."""
        return super().forward(gather_sequence(x, self.group), *args, **kwargs)


class _ScatterOutput(CutModule):
    """A module whose output is summed over ranks and scattered along the sequence."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return reduce_scatter_sequence(super().forward(*args, **kwargs), self.group)


class VocabParallelEmbedding(CutModule):
    """An embedding with some of the rows; other ranks look up the tokens of other rows."""

    weight: Tensor
    num_embeddings: int

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up `tokens` `[B, T]`; returns this rank's part of the sequence."""
        rows = tokens - self.group.rank * -(-self.num_embeddings // self.group.size)
        elsewhere = (rows < 0) | (rows >= self.weight.size(0))
        found = super().forward(rows.masked_fill(elsewhere, 0))
        return reduce_scatter_sequence(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)


class GatheredDropout(CutModule):
    """A dropout of an input that all ranks have whole, so they need the same mask.

    Each rank draws the mask for its part of the sequence.
    """

    p: float

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of `x` `[B, T, ...]`."""
        if not self.training or self.p == 0:
            return x
        shape = (x.size(0), x.size(1) // self.group.size, *x.shape[2:])
        kept = x.new_empty(shape, dtype=torch.uint8).bernoulli_(1 - self.p)
        kept = all_gather_parts(kept, self.group.name, self.group.size)
        return x * kept * (1 / (1 - self.p) if self.p < 1 else 0)


@dataclass(frozen=True)
class ParallelStyle:
    """The way in which one module is sharded: its parameters' placements, and its collectives."""

    placement: Placement | None = None
    """The placement of the module's own parameters."""
    gradient: Placement | None = None
    """The placement of their gradient after a rank's backward."""
    mixin: type[CutModule] = CutModule
    units: int | None = None
    """Each rank uses one of so many parts of the rows of a replicated matrix."""
    whole: tuple[str, ...] = ()
    """Parameters that are replicated: each rank uses them for its part of the work."""
    added_once: tuple[str, ...] = ()
    """Replicated parameters that only one rank adds to its term of a sum."""
    whole_input: bool = False
    """The module's input is the same on all ranks, so its dropouts must be as well."""

    def placements_of(self, parameter: str) -> tuple[Placement, Placement | None]:
        """Return the placements of one of the module's own parameters and of its gradient.

        What no rank cuts, each uses for a term of what all compute together.
        """
        if self.placement is None or parameter in (*self.whole, *self.added_once):
            return Replicate(), Partial()
        return self.placement, self.gradient

    def part_of(self, rows: int, columns: int, degree: int) -> tuple[int, int]:
        """Return the shape of the part of a matrix that one of `degree` ranks multiplies with."""
        if self.units is not None:
            return rows // self.units, columns
        if isinstance(self.placement, Shard):
            return (
                (rows // degree, columns) if self.placement.dim == 0 else (rows, columns // degree)
            )
        return rows, columns


PlanExtension = Callable[[dict[str, ParallelStyle]], None]
"""Changes the styles of a plan in place."""


class TensorStyles:
    """The styles of a model's plan, see `models.spec.TensorParallelStyles`."""

    def __init__(self, degree: int):
        self.degree = degree

    def embedding(self) -> ParallelStyle:
        """See `TensorParallelStyles`."""
        return ParallelStyle(Shard(0), Shard(0), VocabParallelEmbedding)

    def norm(self) -> ParallelStyle:
        """See `TensorParallelStyles`; gradients are of this rank's part of the sequence."""
        return ParallelStyle(Replicate(), Partial())

    def prepare_module_input(self) -> ParallelStyle:
        """See `TensorParallelStyles`."""
        return ParallelStyle(mixin=GatherInput)

    def colwise(self, units: int | None = None) -> ParallelStyle:
        """See `TensorParallelStyles`."""
        if units is None or units % self.degree == 0:
            return ParallelStyle(Shard(0), Shard(0), whole_input=True)
        assert self.degree % units == 0, "the degree was not checked"
        return ParallelStyle(Replicate(), Partial(), units=units, whole_input=True)

    def rowwise(self) -> ParallelStyle:
        """See `TensorParallelStyles`."""
        return ParallelStyle(Shard(1), Shard(1), _ScatterOutput, added_once=("bias",))

    def head(self) -> ParallelStyle:
        """See `TensorParallelStyles`."""
        return ParallelStyle(Shard(0), Shard(0), GatherInput)


def apply_tensor_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    overlap: bool = False,
    extensions: Sequence[PlanExtension] = (),
) -> None:
    """Cut `model`, which is on the meta device, over the 1-D `mesh` as its plan says, in place.

    With `overlap` compiled blocks exchange piece by piece, while they compute (CUDA only).
    `extensions` change the plan first. Raises ValueError for a plan with `plan_problems`.
    """
    declared: object = model
    assert isinstance(declared, LanguageModel)
    if overlap:
        enable_async_tensor_parallel(mesh.get_group().group_name)
    group = TensorGroup(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    plan = extended_plan(declared, group.size, extensions)
    if problems := plan_problems(model, plan):
        raise ValueError("; ".join(problems))
    moved: dict[nn.Parameter, nn.Parameter] = {}  # a tied one is met twice, and stays one
    for name, style in plan.items():
        module = model.get_submodule(name)
        if isinstance(module, CutModule):
            continue  # known by another name, too
        names = tuple(key for key, _ in module.named_parameters(recurse=False))
        for key in names:
            parameter = module._parameters[key]
            assert parameter is not None
            if parameter not in moved:
                placement, _ = style.placements_of(key)
                cut = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
                moved[parameter] = nn.Parameter(cut, parameter.requires_grad)
            module.register_parameter(key, moved[parameter])
        cls: Any = type(module)
        module.__class__ = _cut_class(cls, style, group, names)
        dropouts = [child for child in module.modules() if type(child) is nn.Dropout]
        for dropout in dropouts if style.whole_input else []:
            dropout.__class__ = _gathered_dropout(group)
    for block in filter(is_marked_for_compile, declared.blocks().values()):
        cut = [module for module in block.modules() if isinstance(module, CutModule)]
        block.register_forward_pre_hook(partial(_take_parts, cut))
        block.register_forward_hook(partial(_drop_parts, cut))


def extended_plan(
    model: LanguageModel, degree: int, extensions: Sequence[PlanExtension]
) -> dict[str, ParallelStyle]:
    """Return the model's plan for `degree` ranks, changed by `extensions`."""
    plan = model.tensor_parallel_plan(TensorStyles(degree))
    for extend in extensions:
        extend(plan)
    return plan


@cache
def _cut_class(
    cls: type[nn.Module], style: ParallelStyle, group: TensorGroup, names: tuple[str, ...]
) -> type[nn.Module]:
    # One class for all modules alike, so that blocks stay alike to the compiler.
    members = {name: property(partial(_part, name, style, group)) for name in names}
    return type(f"Cut{cls.__name__}", (style.mixin, cls), {"group": group, **members})


@cache
def _gathered_dropout(group: TensorGroup) -> type[nn.Dropout]:
    return type("GatheredDropout", (GatheredDropout, nn.Dropout), {"group": group})


def _part(name: str, style: ParallelStyle, group: TensorGroup, module: CutModule) -> Tensor:
    """Return the local part of the parameter; autograd carries its gradient back.

    While FSDP has the parameter sharded further, return the parameter: only FSDP asks then.
    """
    if module._parts is not None:
        return module._parts[name]
    parameter = module._parameters[name]
    assert isinstance(parameter, DTensor)
    if len(parameter.placements) > 1:
        return parameter
    _, gradient = style.placements_of(name)
    local = parameter.to_local(grad_placements=[gradient])
    if name in style.added_once:
        return local * float(group.rank == 0)
    if style.units is None or name in style.whole:
        return local
    size = local.size(0) // style.units
    return local.narrow(0, group.rank * style.units // group.size * size, size)


@contextmanager
def hold_local_parts(model: nn.Module) -> Iterator[None]:
    """While entered, read no DTensor in a forward: the local parts are taken once.

    Not for parameters that FSDP shards further, or that change meanwhile.
    """
    modules = [module for module in model.modules() if isinstance(module, CutModule)]
    _take_parts(modules)
    try:
        yield
    finally:
        _drop_parts(modules)


def tensor_group(model: nn.Module) -> TensorGroup | None:
    """Return the ranks over which the model's matrices are cut; None if they are whole."""
    return next((m.group for m in model.modules() if isinstance(m, CutModule)), None)


@torch.compiler.disable
def _take_parts(modules: list[CutModule], *_: object) -> None:
    """Read the local parts before a compiled block's forward, outside of it.

    The compiler meets plain tensors only: it fails to recompute operations on DTensors.
    """
    for module in modules:
        module._parts = {name: getattr(module, name) for name in module._parameters}


@torch.compiler.disable
def _drop_parts(modules: list[CutModule], *_: object) -> None:
    for module in modules:
        module._parts = None
