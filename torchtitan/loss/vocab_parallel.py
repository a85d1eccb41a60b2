"""One rank's share of the vocabulary, for vocabulary-parallel losses (as in Megatron).

With tensor parallelism a rank has the logits of a part of the vocabulary. A softmax over the whole
vocabulary needs a few numbers per token from the other ranks instead of their logits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from torchtitan.utils.torch_compat import all_gather_single


@dataclass(frozen=True)
class VocabShard:
    """One rank's rows of a head that is sharded along the vocabulary.

    Shards have equal sizes except the last ones, which may be smaller.
    """

    total: int
    """Tokens in the vocabulary."""
    group: dist.ProcessGroup
    """The ranks that hold the vocabulary together, in the order of the shards."""
    gather: bool = False
    """Gather the logits of all tokens instead of reducing."""

    @property
    def size(self) -> int:
        """Rows of the largest shard."""
        return -(-self.total // self.group.size())

    @property
    def first(self) -> int:
        """The rank's first row."""
        return self.group.rank() * self.size

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Return the logits of all tokens `[n, V]`, given this rank's `[n, rows]`."""
        padded = F.pad(logits, (0, self.size - logits.size(1)))
        return torch.cat(self._gather(padded), dim=1)[:, : self.total]

    def combine(self, largest: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Combine the log-sum-exps `largest + rest` `[n]` of all shards' logits.

        `largest` is a shard's largest logit. Returns the same two numbers of the whole vocabulary,
        and what to add to the shard's log probabilities. Large logits are only subtracted from each
        other, so nothing is lost to rounding.
        """
        shards = torch.stack(self._gather(torch.stack([largest, rest])))  # [ranks, 2, n]
        whole_largest = shards[:, 0].amax(0)
        whole_rest = (shards[:, 0] - whole_largest + shards[:, 1]).logsumexp(0)
        return whole_largest, whole_rest, (largest - whole_largest) + rest - whole_rest

    def _gather(self, tensor: Tensor) -> tuple[Tensor, ...]:
        gathered = tensor.new_empty(self.group.size() * len(tensor), tensor.size(1))
        all_gather_single(gathered, tensor, self.group)
        return gathered.chunk(self.group.size())
