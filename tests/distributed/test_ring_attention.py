"""Attention over a sequence on several ranks, against attention on one: outputs and gradients."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pool import GlooPool
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention
from torchtitan.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan.parallel.context import ring_attention
from torchtitan.parallel.context.context_parallel import ContextParallel, apply_context_parallel
from torchtitan.parallel.context.sequence_layout import SequenceLayout

SEQ_LEN = 48
NUM_SEQUENCES = 2


@dataclass(frozen=True)
class Setting:
    method: str
    balanced: bool = True
    documents: str = "none"
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.float64
    window: int | None = None

    def context(self, world: DistributedContext) -> ContextParallel:
        return ContextParallel(
            self.method, SequenceLayout(world.world_size, self.balanced), world.control_group
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, whole; strides as in a model."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, upstream = (
            torch.randn(NUM_SEQUENCES, SEQ_LEN, heads, 8, generator=generator, dtype=torch.float64)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        return tuple(x.to(self.dtype).transpose(1, 2) for x in (q, k, v, upstream))  # type: ignore[return-value]

    def document_ids(self) -> Tensor | None:
        """Whole, `[B, T]`; the two sequences have different borders."""
        if self.documents == "none":
            return None
        starts = torch.zeros(NUM_SEQUENCES, SEQ_LEN, dtype=torch.bool)
        if self.documents == "short":  # several in a share, few of them within one chunk
            starts[0, 1::5] = True
            starts[1, 3::7] = True
        elif self.documents == "long":  # over several shares, and starting in their middle
            starts[0, [20, 45]] = True
            starts[1, 31] = True
        else:  # just a share of the sequence: all or nothing is visible
            starts[:, :: SEQ_LEN // 4] = True
        return starts.cumsum(1)


class Model(torch.nn.Module):
    """What context parallelism replaces."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.masks, self.attend = AttentionMaskBuilder(window), InnerAttention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Any:
        positions = torch.zeros(q.size(0), q.size(2), dtype=torch.int64)
        return self.attend(q, k, v, self.masks(document_ids, positions))


def dense_mask(ids: Tensor | None, window: int | None) -> Tensor:
    """Every pair of places spelt out, `[B, 1, T, T]`."""
    back = torch.arange(SEQ_LEN).unsqueeze(1) - torch.arange(SEQ_LEN)
    visible = (back >= 0) & (back < (SEQ_LEN if window is None else window))
    if ids is None:
        return visible[None, None]
    return (visible & (ids.unsqueeze(2) == ids.unsqueeze(1))).unsqueeze(1)


def differences(world: DistributedContext, setting: Setting) -> list[float]:
    """The largest of the output and of the gradients of q, k, v, on this rank."""
    context = setting.context(world)
    whole, ids = setting.inputs(), setting.document_ids()
    exact = [x.double().requires_grad_() for x in whole[:3]]
    expected = InnerAttention()(*exact, dense_mask(ids, setting.window))
    gradients = torch.autograd.grad(expected, exact, whole[3].double())

    share = partial(context.layout.select, chunks=context.layout.chunks(context.rank), dim=2)
    own = [
        share(x).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in whole[:3]
    ]
    model = Model(setting.window)
    apply_context_parallel(model, context)
    out = model(*own, ids)
    found = torch.autograd.grad(out, own, share(whole[3]), retain_graph=True)
    again = torch.autograd.grad(out, own, share(whole[3]))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert [out.dtype, *(x.dtype for x in found)] == [setting.dtype] * 4
    pairs = zip((out, *found), (expected, *gradients), strict=True)
    return [(a - share(b)).abs().max().item() for a, b in pairs]


METHODS = pytest.mark.parametrize(
    ("method", "balanced"),
    [*product(["ring", "allgather"], [True, False]), ("ulysses", False)],
)


def worst(world: DistributedContext, settings: list[Setting]) -> list[float]:
    """The largest difference of each setting, on this rank."""
    return [max(differences(world, setting)) for setting in settings]


def assert_exact(pool: GlooPool, ranks: int, settings: list[Setting]) -> None:
    for found in pool.run(ranks, worst, settings):
        wrong = [setting for setting, far in zip(settings, found, strict=True) if far >= 1e-14]
        assert wrong == []


@METHODS
@pytest.mark.parametrize("ranks", [2, 4])
def test_exact(ranks: int, method: str, balanced: bool, gloo_pool: GlooPool) -> None:
    settings = [
        Setting(method, balanced, documents, kv_heads=kv_heads)
        for documents in ("none", "short", "long", "share")
        for kv_heads in (4, 2, 1)
    ]
    assert_exact(gloo_pool, ranks, settings)


@METHODS
@pytest.mark.parametrize("ranks", [2, 4])
def test_windows(ranks: int, method: str, balanced: bool, gloo_pool: GlooPool) -> None:
    """In a sequence of 48; over 4 ranks chunks have 6 or 12 tokens."""
    settings = [
        Setting(method, balanced, documents, window=window)
        for documents in ("none", "short", "long")
        for window in (1, 2, 5, 6, 7, 12, 13, 25, 47, 48, 1000)
    ]
    assert_exact(gloo_pool, ranks, settings)


def calls_of_kernels(world: DistributedContext, setting: Setting) -> tuple[int, int]:
    """Forwards of kernels on this rank, and of these how many with a mask."""
    context, seen, choose = setting.context(world), [], ring_attention.choose_kernel
    share = partial(context.layout.select, chunks=context.layout.chunks(context.rank), dim=2)
    model = Model(setting.window)
    apply_context_parallel(model, context)

    def watched(part: Any) -> Any:
        seen.append((part.k.size(2), part.visible is not None))
        return choose(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_attention, "choose_kernel", watched)
        model(*(share(x) for x in setting.inputs()[:3]), None)
    return sum(size for size, _ in seen), sum(masked for _, masked in seen)


def test_what_lies_before_the_window_is_not_computed(gloo_pool: GlooPool) -> None:
    """4 chunks of 12: of each chunk before its own the first query sees 12 tokens more."""
    for window, keys in ((1, 12), (2, 24), (13, 24), (14, 36), (25, 36), (26, 48), (48, 48)):
        setting = Setting("allgather", False, window=window)
        last = gloo_pool.run(4, calls_of_kernels, setting)[-1]
        assert last[0] == keys, window
    assert gloo_pool.run(4, calls_of_kernels, Setting("ring", False, window=13))[-1][0] == 24
    assert gloo_pool.run(4, calls_of_kernels, Setting("ring", False, window=48)) == [
        (12 * (rank + 1), 0) for rank in range(4)
    ]


@pytest.mark.parametrize("documents", ["none", "short"])
@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_bfloat16_is_as_near_as_on_one_rank(
    method: str, documents: str, gloo_pool: GlooPool
) -> None:
    """As near to the truth as one call of the kernel: a few roundings, however many the parts."""
    setting = Setting(method, False, documents, dtype=torch.bfloat16)
    (alone,) = gloo_pool.run(1, differences, replace(setting, method="ulysses"))
    for spread in gloo_pool.run(4, differences, setting):
        assert all(a < 1.5 * b for a, b in zip(spread, alone, strict=True))


def merged_types(world: DistributedContext, setting: Setting) -> set[torch.dtype]:
    """What the results of calls are merged into."""
    context = setting.context(world)
    share = partial(context.layout.select, chunks=context.layout.chunks(context.rank), dim=2)
    model, seen, merge = Model(), set(), ring_attention.merge
    apply_context_parallel(model, context)

    def watched(out: Tensor, lse: Tensor, *part: Tensor) -> None:
        seen.update((out.dtype, lse.dtype))
        merge(out, lse, *part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_attention, "merge", watched)
        model(*(share(x) for x in setting.inputs()[:3]), None)
    return seen


@pytest.mark.parametrize(
    ("dtype", "merged"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_merging_is_wide(dtype: torch.dtype, merged: torch.dtype, gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(2, merged_types, Setting("ring", dtype=dtype)) == [{merged}] * 2


def log_sum_exp(world: DistributedContext, setting: Setting) -> tuple[Tensor, Tensor]:
    context = setting.context(world)
    q, k, v, _ = setting.inputs()
    scores = (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).masked_fill(
        ~torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril(), -torch.inf
    )
    share = partial(context.layout.select, chunks=context.layout.chunks(context.rank), dim=2)
    place = context.method, context.layout.balanced, context.group.group_name
    own = share(q).requires_grad_(), share(k), share(v)
    _, lse = ring_attention.context_parallel_attention(*own, None, None, None, *place)
    assert not lse.requires_grad
    return lse, share(scores.logsumexp(-1))


def test_log_sum_exp(gloo_pool: GlooPool) -> None:
    for lse, expected in gloo_pool.run(2, log_sum_exp, Setting("ring", kv_heads=4)):
        torch.testing.assert_close(lse, expected, rtol=0, atol=1e-14)


def check_operator(world: DistributedContext, setting: Setting) -> None:
    context, ids = setting.context(world), setting.document_ids()
    share = partial(context.layout.select, chunks=context.layout.chunks(context.rank), dim=2)
    own = [share(x).requires_grad_() for x in setting.inputs()[:3]]
    levels = (
        None if ids is None else ring_attention.visibility_levels(ids, context.layout, context.rank)
    )
    place = (setting.window, setting.method, setting.balanced, context.group.group_name)
    library.opcheck(ring_attention.context_parallel_attention, (*own, ids, levels, *place))


@pytest.mark.parametrize(("documents", "window"), [("none", None), ("long", None), ("long", 7)])
@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_it_is_what_it_tells_torch(
    method: str, documents: str, window: int | None, gloo_pool: GlooPool
) -> None:
    """Schema, fake tensors, autograd and tracing of the operator."""
    gloo_pool.run(2, check_operator, Setting(method, documents=documents, window=window))


class Count(TorchDispatchMode):
    """Counts the forwards of the operator while entered."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func is torch.ops.torchtitan.context_parallel_attention.default
        return func(*args, **(kwargs or {}))


def forwards_in_backward(world: DistributedContext, option: str) -> int:
    model = Model()
    apply_context_parallel(model, Setting("ring").context(world))
    section = ActivationCheckpoint(mode="selective", selective_ac_option=option)
    apply_activation_checkpoint({"layers.0": model}, section)
    q = torch.randn(1, 2, 8, 8, requires_grad=True)
    out = model(q, q, q, None)
    with Count() as count:
        out.sum().backward()
    return count.calls


@pytest.mark.parametrize(("option", "expected"), [("1", 1), ("op", 0)])
def test_checkpointing_by_operator_keeps_it(
    option: str, expected: int, gloo_pool: GlooPool
) -> None:
    assert gloo_pool.run(2, forwards_in_backward, option) == [expected] * 2
