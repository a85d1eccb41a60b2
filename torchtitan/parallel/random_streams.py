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

Only `TokenDropout` needs no equal microbatches, and no parts: it hashes the token's own place.

Outside of the model's forward, in handlers' hooks, all ranks draw the same.
"""

import hashlib
from collections import Counter
from functools import partial

import torch
from torch import Tensor, nn

from torchtitan.models.spec import LanguageModel
from torchtitan.parallel.initialize import hash_values
from torchtitan.parallel.token_dropout import TokenDropout, low_bits, token_dropouts

TOKEN_INDEX = "token_index"
"""The tensor of a batch, int64 `[B, T]`, that numbers the tokens of each whole sequence."""


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
        self.first_sequence = 0
        """Number among this rank's sequences of the step of the microbatch's first one."""
        self._seed = seed
        self._device = device
        self._num_lanes = num_lanes
        self._own_lanes = num_lanes // dp_degree
        self._first_lane = dp_rank * self._own_lanes
        self._part = part
        self._sequence = 0
        self._uses: Counter[nn.Module] = Counter()
        self._dropouts: dict[nn.Module, list[TokenDropout]] = {}
        self._tokens: Tensor | None = None
        self._token_hashes: dict[int, Tensor] = {}

    @property
    def needs_token_index(self) -> bool:
        """Return whether `begin_microbatch` has to be given `TOKEN_INDEX`."""
        return any(self._dropouts.values())

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
            self._dropouts[module] = token_dropouts(module)
        for name, module in model.named_modules():
            if isinstance(module, TokenDropout):
                module.name_channels(self._seed, name, tensor, self._device)

    def begin_microbatch(self, index: int, token_index: Tensor | None = None) -> None:
        """Seed for a microbatch whose first sequence is number `index` of this rank's step.

        `token_index`: its `TOKEN_INDEX`, of the tokens that this rank has of each sequence.
        """
        self.first_sequence = index
        self._sequence = self.sequence_number(index)
        self._uses.clear()
        self._token_hashes.clear()
        self._tokens = None
        if token_index is not None:
            rows = index + torch.arange(len(token_index), device=token_index.device)
            self._tokens = (self._number(rows).unsqueeze(-1) << 32) + token_index
        self._reseed("microbatch", self._sequence, *self._part)

    def sequence_number(self, index: int) -> int:
        """Return the number within the step of sequence `index` of this rank's."""
        return int(self._number(torch.tensor(index)))

    def _number(self, index: Tensor) -> Tensor:
        """Return the number within the step of this rank's sequences."""
        turn, lane = index // self._own_lanes, index % self._own_lanes
        return turn * self._num_lanes + self._first_lane + lane

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
            use = self._uses[module]
            self._reseed("module", self._sequence, name, use, *part)
            for dropout in self._dropouts[module]:
                dropout.rows = self._rows(use)

    def _rows(self, use: int) -> Tensor:
        """Return the tokens' hashes, int32 `[B, T]`, for a module's forward number `use`."""
        if use not in self._token_hashes:
            assert self._tokens is not None, "begin_microbatch was not given the tokens' indices"
            label = f"tokens/{self.step}/{use}"
            self._token_hashes[use] = low_bits(hash_values(self._tokens, self._seed, label))
        return self._token_hashes[use]

    def _reseed(self, *place: object) -> None:
        where = "/".join(map(str, (self._seed, self.step, *place)))
        seed = int.from_bytes(hashlib.sha256(where.encode()).digest()[:8], "little")
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":  # not run by any test here
            torch.cuda.default_generators[self._device.index].manual_seed(seed)
