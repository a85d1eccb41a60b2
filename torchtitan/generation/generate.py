"""The loop: prompts in, tokens out, one column at a time."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchtitan.generation.kv_cache import KVCache
from torchtitan.generation.sampling import Decode, Sampler, SamplingParams, TextStream
from torchtitan.parallel.data_parallel import free_gathered
from torchtitan.parallel.tensor_parallel import all_gather_parts, hold_local_parts, tensor_group

_COLUMNS_AT_ONCE = 1024
"""Columns of prompts in one forward, which bounds the mask `[B, 1, T, columns]`."""

OnText: TypeAlias = Callable[[int, str], None]
"""Called with the number of a prompt and the text that has come."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue; `number` among all prompts of a command decides random choices."""

    number: int
    ids: Sequence[int]


@dataclass(frozen=True)
class Limits:
    """The ends of a completion: the first one that comes."""

    max_new_tokens: int = 128
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end it, and are no part of its text."""
    stop: tuple[str, ...] = ()
    """Texts that end it, and are no part of it."""


@dataclass
class Completion:
    """A continuation. `finish_reason` is "eos", "stop" (a stop string) or "length"."""

    number: int
    ids: list[int] = field(default_factory=list)
    """Without the token that ended it."""
    text: str = ""
    finish_reason: str = ""


class Generator:
    """Continues prompts with a built model, alone or as one rank of a mesh (FSDP, TP).

    Ranks of a tensor-parallel group call it with the same prompts. With FSDP `any_rank` returns
    whether any rank's argument is true: all go on until all are done, since they gather together.
    """

    def __init__(
        self,
        model: nn.Module,
        decode: Decode,
        max_seq_len: int,
        device: torch.device,
        any_rank: Callable[[bool], bool] = bool,
    ):
        self._model = model
        self._head: Any = model.head
        self._decode = decode
        self._max_seq_len = max_seq_len
        self._device = device
        self._any_rank = any_rank
        self._cache = KVCache(model)
        self._cached: list[int] = []  # the one sequence in the cache
        self._group = tensor_group(model)
        self._tp = 1 if self._group is None else self._group.size
        self._is_gathered = any(isinstance(module, FSDPModule) for module in model.modules())

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        params: SamplingParams,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Return the completions of a batch, in order.

        Each ends by `limits`, or at the model's longest sequence. `on_text` gets whole characters
        as they come. A rank without prompts still has to call it where FSDP gathers.
        """
        state = _Batch(prompts, limits, self._decode, on_text, self._max_seq_len)
        sampler = Sampler(
            params, [p.ids for p in prompts], [p.number for p in prompts], self._device
        )
        with ExitStack() as stack:
            # Tensors of FSDP's that are made in inference mode could not be trained with later.
            stack.enter_context(torch.no_grad() if self._is_gathered else torch.inference_mode())
            if self._is_gathered:
                stack.callback(free_gathered, self._model)
            else:
                stack.enter_context(hold_local_parts(self._model))
            stack.enter_context(self._cache)
            logits = self._prefill([list(prompt.ids) for prompt in prompts] or [[0]])
            while self._any_rank(state.add(sampler(logits)) if state.rows else False):
                if (rows := state.drop_finished()) is not None:
                    kept = torch.tensor(rows, device=self._device)
                    self._cache.keep(kept)
                    sampler.keep(kept)
                logits = self._decode_step(state.last_tokens or [0])
        completions = state.finish()
        self._cached = []
        if len(prompts) == 1:
            ids = [*prompts[0].ids, *completions[0].ids]
            self._cached = ids[: self._cache.length - self._cache.first_column]
        return completions

    def _prefill(self, sequences: list[list[int]]) -> Tensor:
        """Fill the cache; return the logits `[B, V]` behind each sequence."""
        if known := self._known_columns(sequences):
            self._cache.truncate(known)
            sequences = [sequences[0][known - self._cache.first_column :]]
            columns = len(sequences[0])
        else:
            columns = -(-max(map(len, sequences)) // self._tp) * self._tp
            pads = [columns - len(ids) for ids in sequences]
            self._cache.start(torch.tensor(pads, device=self._device))
        padded = [[0] * (columns - len(ids)) + ids for ids in sequences]
        tokens = torch.tensor(padded, device=self._device)
        for part in tokens.split(-(-_COLUMNS_AT_ONCE // self._tp) * self._tp, dim=1):
            positions = self._cache.extend(part.size(1))
            hidden = self._model(part, positions)
        return self._logits(hidden, lambda h, weight: F.linear(h[:, -1], weight))

    def _known_columns(self, sequences: list[list[int]]) -> int:
        """Return how many columns are in the cache from the call before: a conversation goes on."""
        if len(sequences) > 1 or not self._cached:
            return 0
        (ids,) = sequences
        most = min(len(ids) - 1, len(self._cached))
        same = next((n for n in range(most) if ids[n] != self._cached[n]), most)
        same -= (same - len(ids)) % self._tp  # tensor parallelism cuts the rest evenly
        return same + self._cache.first_column if same > 0 else 0

    def _decode_step(self, last: list[int]) -> Tensor:
        """Add a token to each sequence; return the logits `[B, V]` behind it."""
        rows = len(last)
        filled = -(-rows // self._tp) * self._tp
        tokens = torch.tensor([last + [0] * (filled - rows)], device=self._device)
        positions = self._cache.extend_by_one()
        if filled > rows:
            positions = F.pad(positions, (0, filled - rows))
        hidden = self._model(tokens, positions)
        return self._logits(hidden, lambda h, weight: F.linear(h[0, :rows], weight))

    def _logits(self, hidden: Tensor, consume: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        logits = self._head(hidden, consume)
        if self._group is None:
            return logits  # type: ignore[no-any-return]
        vocabulary: int = self._head.out_features
        part = -(-vocabulary // self._tp)
        logits = F.pad(logits, (0, part - logits.size(1)))  # the last ranks hold less
        return all_gather_parts(logits, self._group.name, self._tp)[:, :vocabulary]


class _Batch:
    """The completions of a batch as they grow; `rows` are those that the cache still holds."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        decode: Decode,
        on_text: OnText | None,
        max_seq_len: int,
    ):
        self.rows = list(range(len(prompts)))
        self.last_tokens: list[int] = []
        self._completions = [Completion(prompt.number) for prompt in prompts]
        self._most = [
            min(limits.max_new_tokens, max_seq_len - len(prompt.ids)) for prompt in prompts
        ]
        self._limits = limits
        self._decode = decode
        self._on_text = on_text
        self._streams = [TextStream(decode, limits.stop) for _ in prompts]
        self._needs_text = on_text is not None or bool(limits.stop)

    def add(self, tokens: list[int]) -> bool:
        """Add a token to each row; return whether any row goes on."""
        self.last_tokens = tokens
        for row, token in zip(self.rows, tokens, strict=True):
            if not self._completions[row].finish_reason:
                self._add(row, token)
        return any(not self._completions[row].finish_reason for row in self.rows)

    def _add(self, row: int, token: int) -> None:
        completion = self._completions[row]
        if token in self._limits.eos_ids:
            completion.finish_reason = "eos"
        else:
            completion.ids.append(token)
            if self._needs_text:
                self._emit(row, self._streams[row].push(token))
            if self._streams[row].stopped:
                completion.finish_reason = "stop"
            elif len(completion.ids) >= self._most[row]:
                completion.finish_reason = "length"
        if completion.finish_reason and self._needs_text:
            self._emit(row, self._streams[row].finish())

    def _emit(self, row: int, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(self._completions[row].number, text)

    def drop_finished(self) -> list[int] | None:
        """Drop the finished rows once they are half; return the places of those that stay."""
        going = [n for n, row in enumerate(self.rows) if not self._completions[row].finish_reason]
        if not going or 2 * len(going) > len(self.rows):
            return None
        self.rows = [self.rows[n] for n in going]
        self.last_tokens = [self.last_tokens[n] for n in going]
        return going

    def finish(self) -> list[Completion]:
        """Return the completions with their texts."""
        for completion, stream in zip(self._completions, self._streams, strict=True):
            completion.text = stream.text if self._needs_text else self._decode(completion.ids)
        return self._completions
