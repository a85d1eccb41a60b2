"""`load` and `generate`: any checkpoint as a model in this process, and text from it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

from torchtitan.api import prompts
from torchtitan.api.start import print_notices
from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.paths import expand_path
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.in_process import plain_torch

if TYPE_CHECKING:
    from torch import nn

    from torchtitan.data.tokenizers import Tokenizer
    from torchtitan.generation.sampling import SamplingParams
    from torchtitan.training.pretrained import Pretrained

Message: TypeAlias = dict[str, Any]
"""A turn of a conversation: `role` ("system", "user" or "assistant") and `content`."""
Conversation: TypeAlias = list[Message]
_Requests: TypeAlias = tuple[list[prompts.Request], bool]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]
_DTYPES, _DEVICES = get_args(Dtype), get_args(Device)

_TIMEOUT_SECONDS = 600
_ATTRIBUTE = "pretrained"
"""The attribute of a model with the `Pretrained` that it was loaded from."""


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: Dtype | None = None,
    device: Device = "auto",
    base: str | Path | None = None,
) -> tuple[nn.Module, Tokenizer]:
    """Return a checkpoint's model, ready to run, and its tokenizer.

    The whole model is on one device, in evaluation mode and without gradients.
    `model(tokens, positions)`, both int64 `[B, T]`, returns hidden states `[B, T, D]`, which
    `model.head` turns into logits; `generate` does both.

    Args:
        path: a run's folder (its newest step), a step, a folder of Hugging Face's or Meta's, a
            GGUF file, or `hf://owner/name`.
        tokenizer: the tokenizer, instead of the checkpoint's own.
        dtype: the type of the weights; by default bfloat16 on GPUs and float32 on CPUs.
        device: by default the current GPU where there is one.
        base: for a step of adapters, the unchanged base model if it has moved.

    Raises:
        ConfigError: nothing that can be used is there.
        CheckpointError: it is damaged.
        NonFiniteError: a weight is NaN or infinite.
    """
    import torch

    from torchtitan.checkpoint.base_place import moved_base
    from torchtitan.distributed.context import open_context, require_no_group
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.training.pretrained import describe_pretrained, load_pretrained
    from torchtitan.utils.dtypes import torch_dtype

    for key, value, known in ("device", device, _DEVICES), ("dtype", dtype, (None, *_DTYPES)):
        if value not in known:
            fix = f"one of {', '.join(filter(None, known))}"
            raise ConfigError(ConfigIssue(key, "is unknown", fix, str(value)))
    kind = device_kind(device, "device")
    require_no_group()
    moved = moved_base(None if base is None else os.fspath(base))
    where = None if tokenizer is None else os.fspath(tokenizer)
    found = describe_pretrained(expand_path(os.fspath(path)), where, moved)
    print_notices(found.notices)
    number = torch.cuda.current_device() if kind == "cuda" else 0
    dims = ParallelDims()
    weights = torch_dtype(dtype or default_dtype(kind))
    place = ProcessEnvironment(local_rank=number)
    with plain_torch(), open_context(kind, place, _TIMEOUT_SECONDS) as world:
        model = load_pretrained(found, world, dims.build_mesh(kind), dims, weights)
    setattr(model, _ATTRIBUTE, found)
    return model, found.tokenizer


def device_kind(device: Device, key: str) -> Literal["cpu", "cuda"]:
    """Return the kind of device to use. Raises ConfigError, under `key`, if there is none."""
    import torch

    from torchtitan.utils.device import device_type

    if device == "cuda" and not torch.cuda.is_available():
        problem = "this process sees no GPU"
        raise ConfigError(ConfigIssue(key, problem, "leave it out", "cuda", local=True))
    return device_type(device)


def default_dtype(kind: str) -> str:
    """Return the name of the type of weights on a kind of device."""
    return "bfloat16" if kind == "cuda" else "float32"


@overload
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | Conversation,
    *,
    max_new_tokens: int = ...,
    stop: Iterable[str] = ...,
    temperature: float = ...,
    top_k: int = ...,
    top_p: float = ...,
    min_p: float = ...,
    repetition_penalty: float = ...,
    seed: int = ...,
    batch_size: int = ...,
) -> str: ...


@overload
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: list[str] | list[Conversation],
    *,
    max_new_tokens: int = ...,
    stop: Iterable[str] = ...,
    temperature: float = ...,
    top_k: int = ...,
    top_p: float = ...,
    min_p: float = ...,
    repetition_penalty: float = ...,
    seed: int = ...,
    batch_size: int = ...,
) -> list[str]: ...


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | Conversation | list[str] | list[Conversation],
    *,
    max_new_tokens: int = 256,
    stop: Iterable[str] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> str | list[str]:
    """Return the text that continues a prompt, or the texts for a list of prompts.

    The same prompts and seed give the same texts as `torchtitan generate`.

    Args:
        model: a model of `load`.
        tokenizer: its tokenizer.
        prompt: a text, or a conversation (a list of messages, `{"role": "user", "content": "Hi"}`),
            which the model's chat template turns into text; or a list of either.
        max_new_tokens: the length of the longest answer.
        stop: a text or texts that end an answer, and are no part of it.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the so many most probable tokens are drawn; 0 for all.
        top_p: only the most probable tokens whose probabilities add up to this are drawn.
        min_p: only tokens at least this times as probable as the most probable one are drawn.
        repetition_penalty: above 1, makes tokens rarer that were there before.
        seed: decides the random choices.
        batch_size: prompts that are continued at once.

    Raises:
        ConfigError: a prompt or an option cannot be used.
        TypeError: `model` is not one of `load`.
    """
    from torchtitan.generation.generate import Generator, Limits
    from torchtitan.generation.sampling import SamplingParams

    found = replace(_pretrained_of(model), tokenizer=tokenizer)
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    _check(params, max_new_tokens=max_new_tokens, batch_size=batch_size)
    requests, is_one = _requests(prompt)
    prompts.check_requests(requests)
    template = prompts.template_of(found, requests)
    ends = set(found.eos_ids)
    if template is not None and (end := template.end_of_turn(tokenizer)) is not None:
        ends.add(end)
    stops = (stop,) if isinstance(stop, str) else stop  # which is an iterable of texts, too
    limits = Limits(max_new_tokens, frozenset(ends), tuple(filter(None, stops)))
    work = prompts.encode(found, requests, template)
    device = next(model.parameters()).device
    generator = Generator(model, tokenizer.decode, found.args.max_seq_len, device)
    batches = [work[at : at + batch_size] for at in range(0, len(work), batch_size)]
    with plain_torch():
        texts = [out.text for batch in batches for out in generator.generate(batch, limits, params)]
    return texts[0] if is_one else texts


def _pretrained_of(model: nn.Module) -> Pretrained:
    found = getattr(model, _ATTRIBUTE, None)
    if found is None:
        raise TypeError(f"{type(model).__name__} is not a model that torchtitan.load returned")
    return found  # type: ignore[no-any-return]


def _check(params: SamplingParams, **sizes: int) -> None:
    """Raise ConfigError for options that cannot be used, by the names of the arguments."""
    issues = [
        replace(issue, key=issue.key.removeprefix("--").replace("-", "_"))
        for issue in params.problems()
    ]
    for key, value in sizes.items():
        if value < 1:
            issues.append(ConfigIssue(key, "is less than 1", "write a larger number", value))
    if issues:
        raise ConfigError(issues)


def _requests(prompt: str | Conversation | list[str] | list[Conversation]) -> _Requests:
    """Return the prompts, and whether a single one was given. Raises ConfigError for none."""
    is_one = isinstance(prompt, str | Mapping) or (bool(prompt) and isinstance(prompt[0], Mapping))
    several: Sequence[Any] = [prompt] if is_one else prompt
    if not several:
        raise ConfigError(ConfigIssue("prompt", "is an empty list", "give a text or messages"))
    requests = []
    for number, each in enumerate(several):
        kind = "prompt" if isinstance(each, str) else "messages"
        requests.append(prompts.Request("prompt" if is_one else f"prompt[{number}]", {kind: each}))
    return requests, is_one
