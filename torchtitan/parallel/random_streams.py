"""Random numbers in a model (dropout, noise) as a function of the place, not of the order.

torch's default generators are seeded anew before each of the model's top-level modules, blocks
among them, by (seed, step, sequence, module, use, part): so nothing has to be stored, a resumed run
draws what it would have drawn, and neither evaluation nor a pipeline's order matters. "Sequence" is
the number within the step of the microbatch's first sequence, counted over all data ranks, so data
ranks draw different numbers, and the same ones on any number of ranks as long as a microbatch holds
the same sequences. "Use" counts the forwards of a module within a microbatch: layers that share one
do not share a mask. "Part" is the rank among those that share a sequence, in context and in tensor
parallelism: between cut modules each has a part of the tokens, inside them a part of the channels.
What tensor ranks have alike is in `GatheredDropout` and in the head, whose stream they share.

Outside of the model's forward, in handlers' hooks, all ranks draw the same.
"""

import hashlib
from collections import Counter
from functools import partial

import torch
from torch import nn

from torchtitan.models.spec import LanguageModel


class RandomStreams:
    """Seeds torch's default generators for one rank. `step` is set by the training loop."""

    def __init__(
        self,
        seed: int,
        device: torch.device,
        *,
        num_lanes: int = 1,
        dp_degree: int = 1,
        dp_rank: int = 0,
        part: tuple[int, int] = (0, 0),
    ):
        """Take the lanes of a data rank, and its context and tensor ranks (`part`).

        A data rank takes one sequence in turn from each of its `num_lanes / dp_degree` lanes.
        """
        self.step = 0
        self._seed = seed
        self._device = device
        self._num_lanes = num_lanes
        self._own_lanes = num_lanes // dp_degree
        self._first_lane = dp_rank * self._own_lanes
        self._part = part
        self._sequence = 0
        self._uses: Counter[nn.Module] = Counter()

    def attach(self, model: nn.Module) -> None:
        """Seed before each top-level module of `model`, or of a stage of it, while it trains."""
        declared: object = model
        assert isinstance(declared, LanguageModel)
        blocks, head = declared.blocks(), declared.head
        context, tensor = self._part
        named = {**dict(model.named_children()), **blocks}
        names = {module: name for name, module in reversed(named.items())}  # the first of several
        for module, name in names.items():
            # Tensor ranks have the head's input, and in some losses its logits, whole.
            part = (context,) if module is head else (context, tensor)
            module.register_forward_pre_hook(partial(self._before_module, name, part))

    def begin_microbatch(self, index: int) -> None:
        """Seed for a microbatch whose first sequence is number `index` of this rank's step."""
        turn, lane = divmod(index, self._own_lanes)
        self._sequence = turn * self._num_lanes + self._first_lane + lane
        self._uses.clear()
        self._reseed("microbatch", self._sequence, *self._part)

    def end_microbatches(self) -> None:
        """Seed for the hooks after the last backward, the same on all ranks."""
        self._reseed("hooks")

    # Not compiled: before a compiled block's forward, outside of it.
    @torch.compiler.disable
    def _before_module(
        self, name: str, part: tuple[int, ...], module: nn.Module, args: object
    ) -> None:
        if module.training:
            if torch._C._current_graph_task_id() == -1:  # not a model's own recomputation
                self._uses[module] += 1
            self._reseed("module", self._sequence, name, self._uses[module], *part)

    def _reseed(self, *place: object) -> None:
        where = "/".join(map(str, (self._seed, self.step, *place)))
        seed = int.from_bytes(hashlib.sha256(where.encode()).digest()[:8], "little")
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":  # not run by any test here
            torch.cuda.default_generators[self._device.index].manual_seed(seed)
