"""Trained tokens are those that the model would have to write, whatever the template does."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizer import (
    LLAMA31,
    QWEN25,
    TEMPLATES,
    THINKING_PROMPT,
    UNROLLED,
    ManySpecials,
)
from transformers import PreTrainedTokenizerFast

from torchtitan.data.chat_encoder import ChatEncoder, Encoded
from torchtitan.data.chat_formats import ChatFormat
from torchtitan.data.chat_template import ChatTemplate
from torchtitan.data.chat_templates import find_chat_template
from torchtitan.data.sources import BadRow
from torchtitan.data.tokenizers import build_tokenizer

TOKENIZER = ManySpecials()
DAY = datetime(2024, 7, 26)


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS = {
    "one turn": [user("Hi"), assistant("Hello")],
    "three turns": [
        *(user("a  b\n"), assistant(" 1\n"), user("<|im_end|></s> x"), assistant("\n\n2 <s>")),
        *(user(" c"), assistant("3")),
    ],
    "system": [{"role": "system", "content": "Be brief. "}, user("Hi"), assistant("Hello  \n")],
}


def encoder_of(source: str, train_on: Any = "assistant", **options: Any) -> ChatEncoder:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(source, names, "here", DAY)
    name = options.pop("name", "chat")
    rows = ChatFormat(name, options.pop("columns", {}), options.pop("roles", {}))
    defaults = {"on_long": "truncate_right", "seq_len": 4096, **options}
    return ChatEncoder(rows, template, TOKENIZER, train_on, **defaults)  # type: ignore[arg-type]


def encode(source: str, messages: Any, train_on: Any = "assistant", **options: Any) -> Encoded:
    return encoder_of(source, train_on, **options).encode({"messages": messages})


def trained_texts(unit: Any) -> list[str]:
    """The text of each run of trained tokens."""
    borders = np.flatnonzero(np.diff(unit.trained)) + 1
    parts = np.split(np.arange(len(unit.tokens)), borders)
    return [TOKENIZER.text(unit.tokens[p].tolist()) for p in parts if unit.trained[p[0]]]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_masks_are_those_of_incremental_rendering(name: str, messages: Any) -> None:
    """At inference: the ids of the prompt, then what the model writes, up to its last special."""
    encoder = encoder_of(TEMPLATES[name])
    if name == "gemma" and messages[0]["role"] == "system":
        with pytest.raises(BadRow, match="no system role"):
            encoder.encode({"messages": messages})
        return
    units = list(encoder.encode({"messages": messages}).units)
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(units) == (len(answers) if name in UNROLLED else 1)
    for number, turn in enumerate(answers):
        unit = units[number if len(units) > 1 else 0]
        borders = np.flatnonzero(np.diff([False, *unit.trained, False]))
        start, end = borders.reshape(-1, 2)[number if len(units) == 1 else 0]
        ids = unit.tokens.tolist()
        prompt = encoder.template.encode(messages[:turn], TOKENIZER, True)
        before, written = TOKENIZER.text(ids[:start]), TOKENIZER.text(ids[start:end])
        assert before == TOKENIZER.text(prompt)
        if turn == answers[0]:  # later prompts hold answers, split where they began
            assert ids[:start] == prompt
        whole = TOKENIZER.text(encoder.template.encode(messages[: turn + 1], TOKENIZER, False))
        rest = whole.removeprefix(before + written)
        assert whole.startswith(before + written)
        assert rest.strip() in ("", "</s>" if name == "phi3" else "")
        assert messages[turn]["content"].strip() in written
    assert sum(len(trained_texts(unit)) for unit in units) == len(answers)


def test_the_end_of_a_turn_is_trained_and_what_follows_it_is_not() -> None:
    (unit,) = encode(QWEN25, CONVERSATIONS["three turns"]).units
    assert trained_texts(unit) == [" 1\n<|im_end|>", "\n\n2 <s><|im_end|>", "3<|im_end|>"]
    specials = [i for i in unit.tokens.tolist() if i >= 300]
    assert TOKENIZER.special_ids["<s>"] not in specials  # what people write is no special token


def test_a_token_across_the_beginning_of_an_answer_is_split() -> None:
    (unit,) = encode(QWEN25, [user("x"), assistant("\ny")]).units
    text = TOKENIZER.text(unit.tokens.tolist())
    assert "assistant\n\ny" in text
    assert trained_texts(unit) == ["\ny<|im_end|>"]
    assert 256 not in unit.tokens.tolist()  # the pair of newlines would be one token


def test_last_and_all_and_flags() -> None:
    messages = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]
    (last,) = encode(QWEN25, messages, "last").units
    assert trained_texts(last) == ["a2<|im_end|>"]
    (whole,) = encode(QWEN25, messages, "all").units
    assert whole.trained.all()
    flagged = [user("q1"), assistant("a1", weight=0), user("q2", train=True), assistant("a2")]
    (unit,) = encode(QWEN25, flagged).units
    assert trained_texts(unit) == ["<|im_start|>user\nq2<|im_end|>", "a2<|im_end|>"]
    (unit,) = encode(QWEN25, flagged, "all").units
    assert "a1" not in "".join(trained_texts(unit)) and "q1" in trained_texts(unit)[0]
    (unit,) = encode(QWEN25, [user("q"), assistant("a", train=True)], "last").units
    assert trained_texts(unit) == ["a<|im_end|>"]


def test_generation_blocks_are_believed(smollm2: Path) -> None:
    """Equal to transformers' own mask, on a real tokenizer."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )
    messages = [user("Hi"), assistant("Hello  there"), user("x\n"), assistant("y z")]
    tokenizer = build_tokenizer(str(smollm2))
    template = ChatTemplate(source, {}, "here")
    ours = ChatEncoder(
        *(ChatFormat("chat", {}, {}), template, tokenizer, "assistant", "drop", 999)
    ).encode({"messages": messages})
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"))
    theirs.chat_template = source
    expected: Any = theirs.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    (unit,) = ours.units
    assert unit.tokens.tolist() == expected["input_ids"]
    assert unit.trained.astype(int).tolist() == expected["assistant_masks"]


def test_ids_of_a_real_conversation_are_transformers(smollm2: Path) -> None:
    tokenizer = build_tokenizer(str(smollm2))
    template = find_chat_template(None, tokenizer)
    encoder = ChatEncoder(
        *(ChatFormat("chat", {}, {}), template, tokenizer, "assistant", "drop", 999)
    )
    messages = [user("Hi!  2 + 2?"), assistant("It is 4."), user("naïve 数学"), assistant("No.")]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"))
    theirs.chat_template = template.source
    expected: Any = theirs.apply_chat_template(messages, return_dict=True)
    (unit,) = encoder.encode({"messages": messages}).units
    assert unit.tokens.tolist() == expected["input_ids"]


def test_the_day_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ManySpecials()
    file = Path("unused")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: LLAMA31)
    template = find_chat_template(str(file), tokenizer)
    assert "26 Jul 2024" in template.render([user("x")])


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}


def test_tools_and_calls_reach_the_template() -> None:
    messages = [user("1+1"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "2"}]
    row = {"messages": [*messages, assistant("2")], "tools": json.dumps([TOOL])}
    source = "{{ tools | tojson }}" + QWEN25
    (unit,) = encoder_of(source).encode(row).units
    assert TOKENIZER.text(unit.tokens.tolist()).startswith('[{"type": "function"')
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert trained_texts(unit) == [call, "2<|im_end|>"]


BAD = {
    "unknown role": ([user("x"), {"role": "expert", "content": "y"}], "unknown role 'expert'"),
    "no role": ([{"content": "y"}], "has no role"),
    "no content": ([user("x"), {"role": "assistant"}], r"message 2 .*\(assistant\) has no content"),
    "ends with the user": ([user("x"), assistant("y"), user("z")], "ends with a message of the"),
    "empty answer": ([user("x"), assistant(" ")], "empty answer"),
    "a number": (7, "holds a number where a list of messages"),
    "no messages": ([], "holds no message"),
    "a picture": ([user("x"), assistant([{"type": "image"}])], "part of type 'image'"),
    "half a weight": ([user("x"), assistant("y", weight=0.5)], "weight 0.5"),
    "call ignored": ([user("x"), assistant("y", tool_calls=[CALL])], "has tool calls, and the"),
    "roles alternate": ([user("x"), user("y"), assistant("z")], "roles must alternate"),
    "half a pair": ([user("\ud83d"), assistant("y")], "half a UTF-16 pair"),
}


@pytest.mark.parametrize(("messages", "message"), BAD.values(), ids=BAD)
def test_conversations_that_cannot_be_used(messages: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        encode(TEMPLATES["llama2"], messages)


def test_tools_that_the_template_ignores() -> None:
    row = {"messages": [user("x"), assistant("y")], "tools": [TOOL]}
    with pytest.raises(BadRow, match="has tools, and the chat template does not"):
        encoder_of(QWEN25).encode(row)


def test_a_mask_that_cannot_be_known_is_refused() -> None:
    with pytest.raises(BadRow, match="cannot be known"):
        encode(THINKING_PROMPT, [user("x"), assistant("y")])
    flagged = [user("x"), assistant("y", train=False), user("x"), assistant("<think>1</think>y")]
    with pytest.raises(BadRow, match="cannot be known"):
        encode(TEMPLATES["qwen3"], flagged, "all")


@pytest.mark.parametrize("on_long", ["truncate_right", "truncate_left", "split", "drop"])
def test_long_conversations(on_long: Any) -> None:
    messages = [user("q" * 20), assistant("a" * 50), user("r" * 20), assistant("b" * 50)]
    (whole,) = encode(TEMPLATES["gemma"], messages).units
    seq_len = 64
    found = encode(TEMPLATES["gemma"], messages, on_long=on_long, seq_len=seq_len)
    assert (found.truncated, found.dropped) == (on_long != "drop", on_long == "drop")
    assert found.num_tokens == len(whole.tokens)
    if on_long == "drop":
        assert not found.units and not found.untrained
    elif on_long == "split":  # every token but the first is a target of one part
        targets = np.concatenate([u.tokens[1:][u.trained[1:]] for u in found.units])
        assert np.array_equal(targets, whole.tokens[whole.trained])
        assert all(unit.size <= seq_len for unit in found.units)
    else:
        (unit,) = found.units
        is_left = on_long == "truncate_left"
        kept = whole.tokens[-seq_len - 1 :] if is_left else whole.tokens[: seq_len + 1]
        assert np.array_equal(unit.tokens, kept)


def test_nothing_to_learn_is_counted() -> None:
    found = encode(QWEN25, [user("x"), assistant("y", weight=0)])
    assert found.untrained and not found.units
    found = encode(QWEN25, [user("x" * 200), assistant("y")], seq_len=64)
    assert found.untrained and found.truncated and not found.units


def test_a_long_pair_shares_its_row() -> None:
    encoder = encoder_of(QWEN25, name="preference", seq_len=96)
    found = encoder.encode({"prompt": "x", "chosen": "y" * 90, "rejected": "z"})
    (unit,) = found.units
    assert found.truncated and unit.size == 96 and len(unit.lengths) == 2
    rejected = unit.tokens[unit.lengths[0] :]
    assert TOKENIZER.text(rejected.tolist()).endswith("z<|im_end|>\n")


def test_what_is_left_of_a_long_pair_differs() -> None:
    """Two sides that differ only in what is cut off would teach nothing, and count as a pair."""
    row = {"prompt": "x", "chosen": "y" * 90 + "a", "rejected": "y" * 90 + "b"}
    found = encoder_of(QWEN25, name="preference", seq_len=96).encode(row)
    assert found.untrained and found.truncated and not found.units
    (unit,) = encoder_of(QWEN25, name="preference", seq_len=512).encode(row).units
    assert unit.trained.any()
