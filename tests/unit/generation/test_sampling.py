"""Distributions against transformers' formulas; drawing; text as it comes."""

import random

import pytest
import torch
from transformers.generation import logits_process as theirs

from torchtitan.data.tokenizer_formats import ByteTokenizer
from torchtitan.generation.sampling import (
    Sampler,
    SamplingParams,
    TextStream,
    draw,
    penalize,
    probabilities,
)

CPU = torch.device("cpu")


def logits(rows: int = 5, vocabulary: int = 301) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_probabilities_are_transformers(settings: dict[str, float]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **settings})  # type: ignore[arg-type]
    scores = theirs.TemperatureLogitsWarper(params.temperature)(None, logits())
    if params.top_k:
        scores = theirs.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = theirs.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = theirs.MinPLogitsWarper(params.min_p)(None, scores)
    ours = probabilities(logits(), params)
    ours = ours / ours.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, scores.softmax(-1), atol=1e-7, rtol=1e-5)
    assert torch.equal(ours > 0, scores.softmax(-1) > 0)


def test_repetition_penalty_is_transformers() -> None:
    ids = torch.randint(301, (5, 20), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(5, 301, dtype=torch.bool).scatter_(1, ids, True)
    ours = penalize(logits(), seen, SamplingParams(repetition_penalty=1.4))
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits())
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)


def test_sampler_penalises_prompt_and_answer() -> None:
    params = SamplingParams(repetition_penalty=10.0)
    sampler = Sampler(params, [[3]], [0], CPU)
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert [sampler(scores)[0] for _ in range(3)] == [2, 1, 0]


def test_draws_follow_the_probabilities() -> None:
    probs = probabilities(logits(1), SamplingParams(temperature=1.0, top_k=9))
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(probs.expand(count, -1), uniform).bincount(minlength=301) / count
    expected = probs[0] / probs.sum()
    assert (drawn - expected).abs().max() <= 1.01 / count


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform in (0.0, 0.2999999, 0.3000001, 1 - 2**-53):
        assert draw(probs, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 3)


def test_choices_do_not_depend_on_the_batch() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    scores = logits(6)
    together = Sampler(params, [[0]] * 6, range(6), CPU)
    apart = [Sampler(params, [[0]], [n], CPU) for n in range(6)]
    for _ in range(4):
        expected = [sampler(row[None])[0] for sampler, row in zip(apart, scores)]
        assert together(scores) == expected
    other = Sampler(SamplingParams(temperature=1.0, seed=6), [[0]] * 6, range(6), CPU)
    assert other(scores) != Sampler(params, [[0]] * 6, range(6), CPU)(scores)


def test_wrong_values_are_named() -> None:
    params = SamplingParams(-1.0, -1, 0.0, float("nan"), 0.0)
    assert [problem.key for problem in params.problems()] == [
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
    ]
    assert not SamplingParams().problems()


def stream(text: str, *stops: str) -> tuple[list[str], TextStream]:
    tokenizer = ByteTokenizer()
    found = TextStream(tokenizer.decode, stops)
    pieces = [found.push(token) for token in tokenizer.encode(text, False, False)]
    return [*pieces, found.finish()], found


def test_characters_come_whole() -> None:
    pieces, found = stream("a\u00e9\u4e16\U0001f600!")
    assert [piece for piece in pieces if piece] == ["a", "\u00e9", "\u4e16", "\U0001f600", "!"]
    assert found.text == "".join(pieces)


def test_bytes_that_end_in_the_middle_of_a_character_come_at_the_end() -> None:
    found = TextStream(ByteTokenizer().decode)
    assert [found.push(token) for token in b"a\xe4\xb8"] == ["a", "", ""]
    assert found.finish() == "\ufffd"


def test_a_stop_string_never_shows() -> None:
    pieces, found = stream("one\nQ: two", "\nQ:", "zzz")
    assert "".join(pieces) == found.text == "one"
    assert found.stopped
    pieces, found = stream("one\nQ! two", "\nQ:")
    assert "".join(pieces) == found.text == "one\nQ! two"
    assert pieces[3:6] == ["", "", "\nQ!"]  # held back until it cannot be the stop string


def test_pieces_add_up_to_the_text_of_all_tokens(smollm2: object) -> None:
    from torchtitan.data.tokenizers import build_tokenizer

    tokenizer = build_tokenizer(str(smollm2))
    chance = random.Random(0)
    for _ in range(20):
        ids = [chance.randrange(3, tokenizer.vocab_size) for _ in range(40)]
        found = TextStream(tokenizer.decode)
        pieces = [found.push(token) for token in ids]
        assert "".join(pieces) + found.finish() == tokenizer.decode(ids)
