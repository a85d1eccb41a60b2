"""Cross entropy where each rank has the logits of a part of the vocabulary only.

The softmax needs two things of the whole vocabulary, both a number per token: the largest logit,
and the sum of the exponentials. Each is one small all-reduce (with the second travels the target's
logit, from the one rank that has it), where the logits themselves would be V numbers per token.
Label smoothing needs a third, the sum of the logits, which travels with the second.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from torchtitan.loss.settings import CrossEntropySettings
from torchtitan.utils.torch_compat import all_gather_single


@dataclass(frozen=True)
class VocabParallelCrossEntropy:
    """This rank's rows of a head that is cut into parts of equal size, but for the last ones."""

    total: int
    """Tokens in the vocabulary."""
    group: dist.ProcessGroup
    """The ranks that hold it together, in the order of the parts."""
    gather: bool = False
    """Collect the logits of all tokens instead, and do without the reductions."""

    @property
    def most(self) -> int:
        """Rows of the largest part."""
        return -(-self.total // self.group.size())

    @property
    def first(self) -> int:
        """This rank's first row."""
        return self.group.rank() * self.most

    def whole(self, logits: Tensor) -> Tensor:
        """Logits of all tokens, `[n, V]`, of this rank's, `[n, rows]`."""
        padded = F.pad(logits, (0, self.most - logits.size(1)))
        gathered = padded.new_empty(self.group.size() * len(padded), self.most)
        all_gather_single(gathered, padded, self.group)
        parts = gathered.chunk(self.group.size())
        return torch.cat(parts, dim=1)[:, : self.total]

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, settings: CrossEntropySettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses `[n]` and the plain cross entropies `[n]`, the same on all ranks, and the
        gradient of the losses for this rank's `logits`; for rows that have no target too.

        `logits` is `[n, rows]`, `labels` `[n]` counts in the whole vocabulary.
        """
        z_loss_weight, smoothing = settings.z_loss_weight, settings.label_smoothing
        largest = logits.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        shifted = logits - largest.unsqueeze(1)
        classes = labels - self.first
        elsewhere = (classes < 0) | (classes >= logits.size(1))
        classes = classes.masked_fill_(elsewhere, 0).unsqueeze(1)
        of_target = shifted.gather(1, classes).squeeze(1).masked_fill_(elsewhere, 0)
        of_all = [shifted.sum(-1)] if smoothing else []
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(-1), of_target, *of_all])
        dist.all_reduce(sums, group=self.group)
        log_sums = sums[0].log()
        plain = losses = log_sums - sums[1]
        if smoothing:
            losses = plain + smoothing * (sums[1] - sums[2] / self.total)
        grad = exponentials.div_(sums[0].unsqueeze(1))
        if z_loss_weight:
            log_z = largest + log_sums
            losses = losses + z_loss_weight * log_z**2
            grad.mul_((2 * z_loss_weight * log_z).add_(1).unsqueeze(1))
        here = elsewhere.to(grad.dtype).sub_(1)
        grad.scatter_add_(1, classes, (here * (1 - smoothing) if smoothing else here).unsqueeze(1))
        if smoothing:
            grad.sub_(smoothing / self.total)
        return losses, plain, grad
