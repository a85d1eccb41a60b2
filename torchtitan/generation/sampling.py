"""The next token from logits: penalty, temperature, top-k, top-p, min-p, in that order.

One uniform number decides a token, by a function of (seed, number of the prompt, index of the
token). So the same seed gives the same text on every mesh and in every batch, up to logits that
differ by rounding.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from torchtitan.config.errors import ConfigIssue


@dataclass(frozen=True)
class SamplingParams:
    """The distribution that tokens are drawn from; see docs/guides/generation.md."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Only the so many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Only tokens at least this times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that were there before."""
    seed: int = 0
    """Seed of the random choices."""

    def problems(self) -> list[ConfigIssue]:
        """Return what is wrong, by the flags of the command line."""
        return [
            ConfigIssue(f"--{name.replace('_', '-')}", f"is not {wanted}", fix, getattr(self, name))
            for name, valid, wanted, fix in (
                ("temperature", self.temperature >= 0, "0 or more", "0 is greedy, 1 neutral"),
                ("top_k", self.top_k >= 0, "0 or more", "0 keeps all tokens"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1", "1 keeps all tokens"),
                ("min_p", 0 <= self.min_p <= 1, "from 0 to 1", "0 keeps all tokens"),
                (
                    "repetition_penalty",
                    self.repetition_penalty > 0,
                    "above 0",
                    "1 is no penalty",
                ),
            )
            if not valid  # also for NaN
        ]


class Sampler:
    """Chooses the tokens of a batch of prompts.

    `prompts` are their token ids, `numbers` their numbers among all prompts of the command.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        device: torch.device,
    ):
        self._params = params
        self._random = [random.Random(f"{params.seed}/{number}") for number in numbers]
        self._prompts: Sequence[Sequence[int]] | None = prompts
        self._seen: Tensor | None = None  # bool [B, V]
        self._device = device

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences of the indices `rows` only."""
        self._random = [self._random[row] for row in rows.tolist()]
        self._seen = None if self._seen is None else self._seen[rows]

    def __call__(self, logits: Tensor) -> list[int]:
        """Return the next token of each sequence, by its logits `[B, V]`."""
        params = self._params
        if params.repetition_penalty != 1.0:
            logits = penalize(logits.float(), self._tokens_so_far(logits), params)
        if params.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probs = probabilities(logits, params)
            uniform = [generator.random() for generator in self._random]
            tokens = draw(probs, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
        if self._seen is not None:
            self._seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens.tolist()  # type: ignore[no-any-return]

    def _tokens_so_far(self, logits: Tensor) -> Tensor:
        if self._seen is None:
            assert self._prompts is not None
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, ids in enumerate(self._prompts):
                self._seen[row, torch.tensor(ids, device=logits.device)] = True
            self._prompts = None
        return self._seen


def penalize(logits: Tensor, seen: Tensor, params: SamplingParams) -> Tensor:
    """Return the logits `[B, V]` with those that `seen` `[B, V]` marks made less probable."""
    penalty = params.repetition_penalty
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the probabilities, float32 `[B, V]`, that do not add up to 1 where some are cut."""
    scaled = logits.float() / params.temperature
    if 0 < params.top_k < scaled.size(-1):
        least = scaled.topk(params.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    if params.top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        # Zero where the more probable tokens suffice; the first one always stays.
        before = ordered.cumsum(-1) - ordered
        probs = probs.scatter(-1, order, ordered.masked_fill(before >= params.top_p, 0))
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0)
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return a token `[B]` of each row `[B, V]` of probabilities, by numbers `[B]` in [0, 1)."""
    sums = probs.double().cumsum(-1)
    total = sums[:, -1:]
    # Below the total, however the product is rounded: a token of probability 0 is never drawn.
    target = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, target, right=True).squeeze(1)


Decode: TypeAlias = Callable[[list[int]], str]
"""A tokenizer's `decode`."""


class TextStream:
    """The text of tokens as they come: whole characters only, up to a stop string."""

    def __init__(self, decode: Decode, stops: Sequence[str] = ()):
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._context = self._decoded = 0  # the ids from which, and up to which, text is decoded
        self._emitted = 0
        self.text = ""
        """The text so far, without the stop string that ended it."""
        self.stopped = False
        """A stop string has come."""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._ids.append(token)
        return self._advance(is_last=False)

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._advance(is_last=True)

    def _advance(self, is_last: bool) -> str:
        if not self.stopped:
            self._add(self._new_text(is_last))
        certain = len(self.text)
        if not (is_last or self.stopped):
            certain -= max(self._held_back(), default=0)
        start, self._emitted = self._emitted, max(self._emitted, certain)
        return self.text[start : self._emitted]

    def _new_text(self, is_last: bool) -> str:
        """Decode new ids behind some that came before: tokens alone may lose a leading blank."""
        before = self._decode(self._ids[self._context : self._decoded])
        text = self._decode(self._ids[self._context :])
        # A replacement character at the end may be the first bytes of a character.
        if (text.endswith("\ufffd") and not is_last) or len(text) <= len(before):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return text[len(before) :]

    def _add(self, new: str) -> None:
        start = len(self.text)
        self.text += new
        places = [self.text.find(s, max(0, start - len(s) + 1)) for s in self._stops]
        if found := [place for place in places if place >= 0]:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> Iterator[int]:
        """Yield lengths of the text's end with which a stop string may begin."""
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(stop[:length]):
                    yield length
                    break
