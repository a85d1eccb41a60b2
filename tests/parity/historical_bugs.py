"""Mistakes that libraries of this kind have made, to be put back one at a time.

Each is a function that replaces a part of the library, in the worker processes and until the
training has ended, and the row of the parity table that has to notice it: the smallest mesh that
can. None of them crashes; that is why they lived long elsewhere.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Partial, Replicate

from tests.distributed import tiny
from tests.distributed.tiny import Result
from tests.parity import pipeline_bugs  # noqa: F401 (adds its mistakes to BUGS)
from tests.parity.bugs import BUGS, Patches, shows_on, square_sum
from tests.parity.table import ALLGATHER, PACKED, REGULARISED, RING, TIED, row
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss import cross_entropy
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.optim import update
from torchtitan.parallel import data_parallel, runner
from torchtitan.parallel.context import ring_attention
from torchtitan.parallel.context.context_parallel import ContextParallel, ContextParallelMaskBuilder
from torchtitan.parallel.context.sequence_layout import Block, Call, SequenceLayout
from torchtitan.parallel.runner import SPMDRunner
from torchtitan.parallel.tensor_parallel import ParallelStyle, TensorStyles
from torchtitan.training import model_builder


def train_wrongly(world: DistributedContext, name: str) -> tuple[Result, int]:
    """Train with a mistake; also how many times the code that makes it was called."""
    with Patches() as patches:
        BUGS[name].put_back(patches)
        return tiny.train(world, BUGS[name].case), patches.calls


@shows_on(row(shard=2))
def loss_is_averaged_per_rank(patches: Patches) -> None:
    """Each rank divides by its own targets, and the means are averaged."""

    def mean_of_means(original, self, batches, num_targets):
        own = sum(int(self.loss.count(batch)) for batch in batches)
        return original(self, batches, own * dist.get_world_size())

    patches.put(SPMDRunner, "forward_backward", mean_of_means)


@shows_on(row(shard=2))
def gradients_are_averaged_over_ranks(patches: Patches) -> None:
    """FSDP's default."""
    patches.put(data_parallel, "sum_gradients", lambda original, model: None)


@shows_on(row(microbatches=4))
def loss_is_averaged_per_microbatch(patches: Patches) -> None:
    """Each microbatch is divided by its own targets, and the means are averaged."""

    def mean_of_means(original, self, batches, num_targets):
        count = [max(1, int(self.loss.count(batch))) * len(batches) for batch in batches]
        return sum(original(self, [batch], n) for batch, n in zip(batches, count, strict=True))

    patches.put(SPMDRunner, "forward_backward", mean_of_means)


@shows_on(row(shard=2, microbatches=2, **TIED))
def accumulation_divides_twice(patches: Patches) -> None:
    """By the step's targets, and by the number of microbatches."""

    def divide_again(original, self, batches, num_targets):
        return original(self, batches, num_targets * len(batches))

    patches.put(SPMDRunner, "forward_backward", divide_again)


@shows_on(row(shard=2, microbatches=2, **TIED))
def only_the_first_microbatch_is_reduced(patches: Patches) -> None:
    """The flag that puts off the reduction is turned round."""
    patches.put(
        runner, "set_gradient_sync", lambda original, model, enabled: original(model, not enabled)
    )


@shows_on(row(shard=2))
def norm_of_the_own_shard(patches: Patches) -> None:
    """Every rank clips by the norm of what it holds."""
    patches.put(update, "gradient_norm", lambda original, *args: square_sum(*args).sqrt())


@shows_on(row(replicate=2))
def norm_counts_copies(patches: Patches) -> None:
    """The squares of all ranks are added, of copies too."""
    patches.put(update, "gradient_norm", _norm_of_all_ranks)


@shows_on(row(tp=2))
def norm_counts_what_tensor_parallel_ranks_share(patches: Patches) -> None:
    """The same among ranks that share some parameters only."""
    patches.put(update, "gradient_norm", _norm_of_all_ranks)


@shows_on(row(shard=2))
def seeds_differ_between_ranks(patches: Patches) -> None:
    """Every rank draws its initial weights for itself."""

    def own_seed(original, named, rule, seed):
        original(named, rule, seed + dist.get_rank())

    patches.put(model_builder, "initialize_tensors", own_seed)


@shows_on(row(tp=2))
def vocabulary_is_cut_evenly(patches: Patches) -> None:
    """The remainder of the division is forgotten where labels are looked up."""
    patches.put(
        VocabShard,
        "first",
        lambda original, self: self.group.rank() * (self.total // self.group.size()),
    )


@shows_on(row(tp=2))
def padding_of_the_vocabulary_takes_part(patches: Patches) -> None:
    """The last rank's missing rows are logits of zero in the softmax."""

    def padded(original, logits, labels, settings, shard):
        rows = logits.size(1)
        logits = F.pad(logits, (0, shard.size - rows))
        *losses, grad = original(logits, labels, settings, shard)
        return *losses, grad[:, :rows]

    patches.put(cross_entropy, "cross_entropy", padded)


@shows_on(row(REGULARISED, tp=2))
def z_loss_is_of_the_own_rows(patches: Patches) -> None:
    """Each rank squares the log-sum-exp of its part of the vocabulary."""

    def own(original, logits, labels, settings, shard):
        z, log_z = settings.z_loss_weight, logits.logsumexp(-1, keepdim=True)
        plain_settings = type(settings)(label_smoothing=0.1)
        losses, plain, grad = original(logits, labels, plain_settings, shard)
        return losses + z * log_z[:, 0] ** 2, plain, grad + 2 * z * log_z * logits.softmax(-1)

    patches.put(cross_entropy, "cross_entropy", own)


@shows_on(row(tp=2))
def loss_is_counted_on_every_tensor_parallel_rank(patches: Patches) -> None:
    """All of them compute the same loss, and all add it."""
    patches.put(ParallelDims, "is_loss_leader", lambda original, self, rank: True)


@shows_on(row(tp=2))
def norm_weights_gradients_stay_apart(patches: Patches) -> None:
    """Each rank's norms see its part of the sequence, and nothing adds their gradients up."""
    patches.put(TensorStyles, "norm", lambda _, self: ParallelStyle(Replicate(), Replicate()))


@shows_on(row(tp=2))
def norm_weights_gradients_are_averaged(patches: Patches) -> None:
    """They are added up, and divided by the number of parts."""
    patches.put(TensorStyles, "norm", lambda _, self: ParallelStyle(Replicate(), Partial("avg")))


@shows_on(row(tp=8, kv_heads=2))
def copies_of_key_heads_are_not_added_up(patches: Patches) -> None:
    """More ranks than key heads: each takes its own queries' part for the whole gradient."""

    def apart(original, self, units=None):
        style = original(self, units)
        if style.units is None:
            return style
        return ParallelStyle(style.placement, Replicate(), style.mixin, style.units)

    patches.put(TensorStyles, "colwise", apart)


@shows_on(row(RING, cp=2))
def positions_are_not_permuted(patches: Patches) -> None:
    """Tokens are spread head-tail, positions in order."""

    def in_order(original, self, batch):
        share = original(self, batch)
        share["positions"] = batch["positions"].chunk(self.layout.degree, 1)[self.rank]
        return share

    patches.put(ContextParallel, "shard_batch", in_order)


@shows_on(row(RING, cp=2))
def mask_is_for_a_sequence_in_order(patches: Patches) -> None:
    """Tokens are spread head-tail; earlier ranks are seen whole, and later ones not at all."""

    def in_order(original, self, rank):
        own, *_ = original(self, rank)
        blocks = [own]
        for step in range(1, self.degree):
            source = (rank - step) % self.degree
            whole = Call(range(2), range(2), causal=False)
            blocks.append(Block(self.chunks(source), (whole,) if source < rank else ()))
        return blocks

    patches.put(SequenceLayout, "blocks_in_turn", in_order)


@shows_on(row(RING, cp=2, **PACKED))
def documents_are_ignored(patches: Patches) -> None:
    """Attention over several ranks is plainly causal."""
    patches.put(ContextParallelMaskBuilder, "forward", lambda original, self, *batch: None)


@shows_on(row(RING, cp=2, **PACKED))
def documents_are_counted_in_each_share(patches: Patches) -> None:
    """The ids that meet were numbered from the start of each share."""

    def from_zero(original, queries, keys):
        return original(queries - queries[:, :1], keys - keys[:, :1])

    patches.put(ring_attention, "_same_document", from_zero)


@shows_on(row(RING, cp=2, **PACKED))
def queries_that_see_nothing_count(patches: Patches) -> None:
    """The kernel's log-sum-exp of 0 for them is believed, and halves what other keys gave."""

    def believed(original, part):
        def forward(part):
            out, lse = kernel.forward(part)
            return out, lse.masked_fill(lse.isneginf(), 0.0)

        kernel = original(part)
        return kernel._replace(forward=forward)

    patches.put(ring_attention, "choose_kernel", believed)


@shows_on(row(RING, cp=2))
def backward_normalises_by_one_share(patches: Patches) -> None:
    """It takes the log-sum-exp of the keys at hand for that of all keys."""

    def of_share(original, part):
        def backward(part, grad, out, lse):
            return kernel.backward(part, grad, out, kernel.forward(part)[1])

        kernel = original(part)
        return kernel._replace(backward=backward)

    patches.put(ring_attention, "choose_kernel", of_share)


@shows_on(row(RING, cp=2))
def labels_are_shifted_in_each_share(patches: Patches) -> None:
    """A share's last token predicts nothing, and its first half's last one the wrong token."""

    def shift(original, self, batch):
        share = original(self, batch)
        labels = share["tokens"].roll(-1, 1)
        labels[:, -1] = IGNORE_INDEX
        share["labels"] = labels.masked_fill(share["labels"] == IGNORE_INDEX, IGNORE_INDEX)
        return share

    patches.put(ContextParallel, "shard_batch", shift)


@shows_on(row(ALLGATHER, cp=2, **TIED))
def gradients_stay_apart_along_the_sequence(patches: Patches) -> None:
    """Parameters are shared out over data ranks only."""
    patches.put(ParallelDims, "shard_mesh", lambda original, self, mesh: mesh["dp_shard"])


def _norm_of_all_ranks(_original, parameters, *_) -> torch.Tensor:
    total = square_sum(parameters)
    dist.all_reduce(total)
    return total.sqrt()
