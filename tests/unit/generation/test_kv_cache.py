"""Generation with a cache against the training forward on the whole sequence, in float64."""

from typing import Any

import pytest
import torch
from torch import nn

from torchtitan.generation import generate, kv_cache
from torchtitan.generation.generate import Generator, Limits, Prompt
from torchtitan.generation.kv_cache import KVCache
from torchtitan.generation.sampling import SamplingParams
from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention
from torchtitan.models.decoder.args import DecoderArgs, build_decoder
from torchtitan.parallel.initialize import initialize_parameters
from torchtitan.utils.dtypes import default_dtype

CPU = torch.device("cpu")
GREEDY = SamplingParams()
IDS = [[5, 3, 9, 60, 2, 7, 8], [11], [4, 4, 100], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


def build(**changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    args = DecoderArgs(**{**sizes, "vocab_size": 131, **changes})
    with default_dtype(torch.float64):
        model = build_decoder(args)
    initialize_parameters(model, model.init_rule, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that logits differ, and the text is no repetition
    return model.requires_grad_(False)


def generator(model: nn.Module, longest: int = 1000) -> Generator:
    return Generator(model, str, longest, CPU)


def answers(found: Generator, *ids: list[int], new: int = 12, **limits: Any) -> list[list[int]]:
    prompts = [Prompt(number, each) for number, each in enumerate(ids)]
    completions = found.generate(prompts, Limits(new, **limits), GREEDY)
    return [completion.ids for completion in completions]


def reference(model: Any, ids: list[int], new: int = 12) -> list[int]:
    ids = list(ids)
    for _ in range(new):
        tokens = torch.tensor([ids])
        hidden = model(tokens, torch.arange(len(ids))[None])
        ids.append(int(model.head(hidden)[0, -1].argmax()))
    return ids[-new:]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 4, "qk_norm": True, "head_dim": 6, "tied_embeddings": True},
        {"sliding_window": 5},
        {"sliding_window": 1},
        {"norm_type": "layernorm", "qkv_bias": True},
    ],
)
def test_answers_are_those_of_the_training_forward(changes: dict[str, Any]) -> None:
    model = build(**changes)
    expected = [reference(model, ids) for ids in IDS]
    assert len({tuple(each) for each in expected}) == len(IDS)
    assert answers(generator(model), *IDS) == expected
    assert [answers(generator(model), ids)[0] for ids in IDS] == expected


@pytest.mark.parametrize("window", [None, 5])
def test_long_prompts_are_read_in_parts(window: int | None, monkeypatch: Any) -> None:
    model = build(sliding_window=window)
    expected = [reference(model, ids) for ids in IDS]
    monkeypatch.setattr(generate, "_COLUMNS_AT_ONCE", 4)
    assert answers(generator(model), *IDS) == expected
    assert answers(generator(model), IDS[3]) == expected[3:]


def test_the_cache_grows(monkeypatch: Any) -> None:
    monkeypatch.setattr(kv_cache, "_FIRST_COLUMNS", 8)
    model = build()
    assert answers(generator(model), IDS[0], IDS[1], new=40) == [
        reference(model, ids, 40) for ids in IDS[:2]
    ]


def test_the_model_is_as_before() -> None:
    model = build()
    before = dict(model.named_modules())
    with KVCache(model):
        kinds = {type(module) for module in model.modules()}
        assert not kinds & {InnerAttention, AttentionMaskBuilder}
        assert "forward" in vars(model.norm)
    with pytest.raises(ZeroDivisionError), KVCache(model):
        raise ZeroDivisionError
    after = dict(model.named_modules())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="no InnerAttention"):
        KVCache(nn.Linear(2, 2))


def test_rows_that_end_are_dropped() -> None:
    model = build()
    expected = [reference(model, ids, 40) for ids in IDS]
    eos = frozenset({expected[0][3], expected[1][1], expected[2][5]})
    counted: list[int] = []
    model.register_forward_pre_hook(lambda _, given: counted.append(given[0].numel()))
    found = generator(model).generate(
        [Prompt(n, ids) for n, ids in enumerate(IDS)], Limits(40, eos), GREEDY
    )
    for completion, full in zip(found, expected):
        end = next((n for n, token in enumerate(full) if token in eos), len(full))
        assert completion.ids == full[:end]
        assert completion.finish_reason == ("eos" if end < len(full) else "length")
    assert counted[1] == 4 and counted[-1] == 1


def test_a_conversation_reads_only_what_is_new() -> None:
    model = build()
    found, counted = generator(model), []
    (first,) = answers(found, IDS[3], new=6)
    model.register_forward_pre_hook(lambda _, given: counted.append(given[0].numel()))
    longer = [*IDS[3], *first, 77, 78]
    assert answers(found, longer) == [reference(model, longer)]
    assert counted[0] == 3  # the last token of the answer, which was never fed, and two more
    other = [*IDS[3][:5], 99, 98]
    counted.clear()
    assert answers(found, other) == [reference(model, other)]
    assert counted[0] == 2
    counted.clear()
    assert answers(found, other) == [reference(model, other)]
    assert counted[0] == 1  # logits need a token


def test_the_longest_sequence_ends_a_text() -> None:
    model = build()
    found = generator(model, longest=10)
    (completion,) = found.generate([Prompt(0, IDS[0])], Limits(50), GREEDY)
    assert completion.finish_reason == "length"
    assert len(completion.ids) == 3


def test_stop_strings_end_a_text() -> None:
    model = build()
    decode = "".join
    words = [f"<{n}>" for n in range(131)]
    found = Generator(model, lambda ids: decode(words[i] for i in ids), 1000, CPU)
    expected = reference(model, IDS[0])
    pieces: list[str] = []
    (completion,) = found.generate(
        [Prompt(0, IDS[0])],
        Limits(12, stop=(f"><{expected[4]}>",)),
        GREEDY,
        lambda number, text: pieces.append(text),
    )
    assert completion.finish_reason == "stop"
    assert completion.text == "".join(pieces) == "".join(words[i] for i in expected[:4])[:-1]
