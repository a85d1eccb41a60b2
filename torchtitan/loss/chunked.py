"""Token losses computed on one chunk of the tokens at a time.

The logits of a microbatch, `[B * T, V]`, are often the largest tensor of all. In chunks only a part
of them exists at a time: the forward computes each chunk's loss and gradient, and frees its logits.
On CPUs this is also faster, because less fresh memory is touched (page faults) and the backward
does not read all logits again. Small chunks cost time, because each adds to the gradient of the
whole head matrix.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchtitan.config.schema import Section
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.utils.dtypes import at_least_float32

_MOST_CHUNKS, _LEAST_TOKENS = 8, 512
"""Defaults where the number of chunks is not given: as fast as one (`scripts/bench_loss.py`)."""


class ChunkedLoss:
    """A loss that is a sum over all targets; labels of `IGNORE_INDEX` are not targets.

    Subclasses define `token_losses`. Chunks, gradients and vocabulary parallelism are handled here.
    """

    Settings: type[Section] = Section
    """The model of `[loss.args]`."""

    supports_vocab_parallel = True

    terms: tuple[str, ...] = ()
    """Names of the sums that are logged beside the loss; see `parallel.runner.Loss`."""

    def __init__(
        self,
        settings: Any,
        num_chunks: int | None = 1,
        shard: VocabShard | None = None,
    ):
        """Create the loss.

        Args:
            settings: a `Settings`.
            num_chunks: chunks of a microbatch's tokens; None for as many as cost no time.
            shard: this rank's part of the vocabulary; None for the whole.
        """
        self.settings = settings
        self.num_chunks = num_chunks
        self.shard = shard
        self.part = slice(None)
        """The tokens of the chunk at hand, among those of the microbatch."""
        self._sums: dict[str, Tensor] = {}
        self._no_target: Tensor | None = None  # bool [n], of the tokens that token_losses is given

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses `[n]` of a chunk of tokens, differentiable by autograd.

        `logits` is `[n, V]`, float32 (float64 for a float64 model). `labels` is `[n]`; tokens that
        are not targets have label 0, and values returned or reported for them are ignored.
        """
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        """Return the number of targets, an int64 scalar."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Return the sum over the targets, a float32 scalar (float64 for a float64 model).

        `hidden` is `[B, T, D]`; `head(hidden, consume)` calls `consume(hidden, weight)`.
        """
        labels = batch["labels"].flatten()
        trains = torch.is_grad_enabled()

        def consume(hidden: Tensor, weight: Tensor) -> Tensor:
            return _InChunks.apply(hidden.flatten(0, -2), weight, labels, self, trains)

        return head(hidden, consume)

    def chunk_size(self, num_tokens: int) -> int:
        """Return the number of tokens in a chunk of a microbatch."""
        return chunk_size(num_tokens, self.num_chunks)

    def chunk(self, logits: Tensor, labels: Tensor, train: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sum over the targets of a chunk, and its gradient for the `logits`.

        `logits` `[n, rows]` are this rank's, `labels` is `[n]`. The sum is computed in at least
        float32. The gradient is None unless `train`; its rows without a target need not be zero.
        """
        whole = logits if self.shard is None else self.shard.gather_logits(logits)
        wide = whole.detach().to(at_least_float32(logits.dtype)).requires_grad_(train)
        no_target = labels == IGNORE_INDEX
        with torch.set_grad_enabled(train):
            self._no_target = no_target
            losses = self.token_losses(wide, labels.clamp_min(0))
            self._no_target = None
            if losses.shape != labels.shape:  # a mean would be broadcast silently
                given, name = list(losses.shape), type(self).__name__
                raise ValueError(
                    f"{name}.token_losses gives {given} for {len(labels)} tokens, not one loss each"
                )
            loss = losses.masked_fill(no_target, 0).sum()
        if not train:
            return loss, None
        (grad,) = torch.autograd.grad(loss, wide)
        if self.shard is not None:
            grad = grad.narrow(1, self.shard.first, logits.size(1))
        return loss.detach(), grad

    def report(self, name: str, value: Tensor) -> None:
        """Add to a term.

        `value` is `[n]` in `token_losses`, one number a token, of which those of targets are
        summed; elsewhere a scalar, the sum over the targets of a chunk or microbatch.
        Raises ValueError for another shape, and for a name that is not in `terms`.
        """
        if name not in self.terms:
            declared = ", ".join(self.terms) or "none"
            raise ValueError(f"{type(self).__name__} reports {name}; its `terms` are: {declared}")
        mask = self._no_target
        shape = torch.Size() if mask is None else mask.shape
        if value.shape != shape:  # a sum would count tokens that are not targets
            kind = "a scalar, a sum over targets" if mask is None else f"{list(shape)}, one a token"
            found = list(value.shape)
            raise ValueError(f"{type(self).__name__}.report({name!r}): {found} instead of {kind}")
        value = value.detach()
        if mask is not None:
            value = value.masked_fill(mask, 0).sum()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take_terms(self) -> dict[str, Tensor]:
        """Return and forget what was reported since the last call."""
        sums, self._sums = self._sums, {}
        return sums


def chunk_size(num_tokens: int, num_chunks: int | None) -> int:
    """Return the number of tokens in a chunk; `num_chunks` None is as many as cost no time."""
    chunks = num_chunks or max(1, min(_MOST_CHUNKS, num_tokens // _LEAST_TOKENS))
    return -(-num_tokens // chunks)


class HeadGradients:
    """The gradients of `hidden` `[N, D]` and `weight` `[V, D]`, from those of chunks of logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, no_target: Tensor, want: tuple[bool, ...]):
        """Create them for the inputs that `want` says; tokens with `no_target` `[N]` add nothing.

        Their gradients are zeroed at the narrow ends of the products, not in the logits.
        """
        self._hidden, self._weight, self._want_weight = hidden, weight, want[1]
        self._no_target = no_target.unsqueeze(1)
        self._of_hidden = torch.empty_like(hidden) if want[0] else None
        self._of_weight: Tensor | None = None

    def add(self, part: slice, grad_logits: Tensor) -> None:
        """Add the gradient of the logits `[n, V]` of the tokens in `part`."""
        hidden = self._hidden[part]
        grad_logits = grad_logits.to(hidden.dtype)
        if self._of_hidden is not None:
            torch.mm(grad_logits, self._weight, out=self._of_hidden[part])
        if not self._want_weight:
            return
        product = grad_logits.t() @ hidden.masked_fill(self._no_target[part], 0)
        # Kept wide, whatever the weight's type: it is a sum over all tokens.
        if self._of_weight is None:
            self._of_weight = product.to(at_least_float32(hidden.dtype))
        else:
            self._of_weight.add_(product)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Return both gradients, the weight's in at least float32; None where not wanted."""
        if self._of_hidden is not None:
            self._of_hidden.masked_fill_(self._no_target, 0)
        return self._of_hidden, self._of_weight


class _InChunks(torch.autograd.Function):
    """The `loss` of `hidden` `[N, D]` @ `weight` `[V, D]`^T against `labels` `[N]`.

    The forward computes the gradients of the sum; the backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss: ChunkedLoss, train: bool
    ) -> Tensor:
        want = tuple(train and needed for needed in ctx.needs_input_grad[:2])
        dtype = at_least_float32(hidden.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        gradients = HeadGradients(hidden, weight, labels == IGNORE_INDEX, want)
        for start in range(0, len(hidden), size := loss.chunk_size(len(hidden))):
            part = loss.part = slice(start, start + size)
            # No name for the logits here, which would keep them for one chunk too long.
            of_chunk, grad_logits = loss.chunk(hidden[part] @ weight.t(), labels[part], train)
            total += of_chunk
            if grad_logits is not None:
                gradients.add(part, grad_logits)
            del grad_logits  # before the next chunk's logits are there
        ctx.save_for_backward(*gradients.finish())
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
