"""Columns of the usual formats, under their own and under other names."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat_data import all_steps, chat_config, texts, write_rows
from torchtitan.config import ConfigError
from torchtitan.data.chat_formats import ChatFormat
from torchtitan.data.registry import build_source
from torchtitan.data.sources import BadRow

TURNS = [("system", "s"), ("user", "q"), ("assistant", "a")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("chat", {"messages": MESSAGES}),
    "as text": ("chat", {"messages": json.dumps(MESSAGES)}),
    "in parts": (
        "chat",
        {
            "messages": [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES
            ]
        },
    ),
    "sharegpt": (
        "chat",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
    ),
    "alpaca": ("instruct", {"system": "s", "instruction": "q", "input": "", "output": "a"}),
    "completion": ("instruct", {"system": "s", "prompt": "q", "completion": "a"}),
    "conversational completion": (
        "instruct",
        {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    ),
}


@pytest.mark.parametrize(("name", "row"), GIVEN.values(), ids=GIVEN)
def test_the_usual_columns(name: str, row: dict[str, Any]) -> None:
    found = ChatFormat(name, {}, {}).conversation(row)
    assert [(m["role"], m["content"]) for m in found.messages] == TURNS
    assert found.flags == [None] * 3 and found.tools is None


def test_answers_in_a_prompt_are_not_trained() -> None:
    row = {"prompt": [*MESSAGES, MESSAGES[1]], "completion": MESSAGES[2:]}
    found = ChatFormat("instruct", {}, {}).conversation(row)
    assert found.flags == [None, None, False, None, None]


def test_the_input_of_alpaca_follows_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (question, _) = ChatFormat("instruct", {}, {}).conversation(row).messages
    assert question["content"] == "Add.\n\n1 2"


def test_other_names() -> None:
    columns = {"messages": "dialogue", "role": "speaker", "content": "said"}
    rows = ChatFormat("chat", columns, {"customer": "user", "agent": "assistant"})
    said = [{"speaker": "customer", "said": "q"}, {"speaker": "agent", "said": "a"}]
    found = rows.conversation({"dialogue": said})
    assert [(m["role"], m["content"]) for m in found.messages] == TURNS[1:]
    assert "dialogue" in rows.columns


PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "prompt is a list": {"prompt": MESSAGES[1:2], "chosen": "good", "rejected": "bad"},
    "conversations": {
        side: [MESSAGES[1], {"role": "assistant", "content": text}]
        for side, text in (("chosen", "good"), ("rejected", "bad"))
    },
    "conversations beside their prompt": {
        "prompt": "q",
        **{
            side: [MESSAGES[1], {"role": "assistant", "content": text}]
            for side, text in (("chosen", "good"), ("rejected", "bad"))
        },
    },
    "answers as lists": {
        "prompt": "q",
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs(row: dict[str, Any]) -> None:
    chosen, rejected = ChatFormat("preference", {}, {}).pair(row)
    for side, text in ((chosen, "good"), (rejected, "bad")):
        assert [(m["role"], m["content"]) for m in side.messages] == [
            ("user", "q"),
            ("assistant", text),
        ]
        assert side.flags == [False, None]


def test_a_mapped_key_wins_over_the_usual_one() -> None:
    rows = ChatFormat("chat", {"content": "clean", "role": "speaker"}, {})
    message = {"speaker": "user", "role": "assistant", "clean": "a", "content": "<b>a</b>"}
    answer = {"role": "assistant", "content": "b"}
    found = rows.conversation({"messages": [message, answer]})
    assert found.messages == [{"role": "user", "content": "a"}, answer]


def test_flags_of_pairs() -> None:
    """The prompt is never trained; the flags of the answers count."""
    sides = {
        side: [{"role": "assistant", "content": side, "weight": 0}, MESSAGES[1], answer]
        for side, answer in (("chosen", MESSAGES[2]), ("rejected", {**MESSAGES[2], "train": True}))
    }
    prompt = [{**MESSAGES[1], "weight": 1}]
    chosen, rejected = ChatFormat("preference", {}, {}).pair({"prompt": prompt, **sides})
    assert chosen.flags == [False, False, None, None]
    assert rejected.flags == [False, False, None, True]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("chat", {"text": "x"}, "no column 'messages' or 'conversations'.*columns are 'text'"),
        ("chat", {"prompt": "x", "completion": "y"}, 'look like format = "instruct"'),
        ("instruct", {"chosen": "x", "rejected": "y"}, 'look like format = "preference"'),
        ("instruct", {"instruction": "x", "output": ""}, "empty answer"),
        ("instruct", {"instruction": "x", "input": 3, "output": "y"}, "'input' holds a number"),
        ("preference", {"chosen": "x", "rejected": "y"}, "there is no column 'prompt'"),
        ("preference", {"prompt": "q", "chosen": "x", "rejected": "x"}, "are equal"),
        ("chat", {"messages": MESSAGES, "tools": "{"}, "holds invalid JSON"),
        ("chat", {"messages": MESSAGES, "tools": 3}, "'tools' holds a number"),
    ],
)
def test_rows_that_do_not_fit(name: str, row: dict[str, Any], message: str) -> None:
    rows = ChatFormat(name, {}, {})
    with pytest.raises(BadRow, match=message):
        rows.pair(row) if name == "preference" else rows.conversation(row)


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "hf"])
def test_files_and_datasets_give_the_same(tmp_path: Path, name: str) -> None:
    rows = [{"id": n, "messages": [*MESSAGES[:2], {**MESSAGES[2], "weight": 1}]} for n in range(30)]
    for number, row in enumerate(rows):
        row["messages"][1] = {"role": "user", "content": f"q{number}"}  # type: ignore[index]
    if name == "hf":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        config = chat_config(str(tmp_path / "saved"), dataset="hf", epochs=1)
    else:
        config = chat_config(write_rows(tmp_path, rows, name), epochs=1)
    found = [text for step in all_steps(config) for row in step for text in texts(row)]
    questions = sorted(text.split("user\n")[1].split("<")[0] for text in found if "user" in text)
    assert questions == sorted(f"q{n}" for n in range(30))


@pytest.mark.parametrize("name", ["data.parquet", "hf"])
def test_columns_of_another_format_are_found_before_a_row_is_read(
    tmp_path: Path, name: str
) -> None:
    rows = [{"prompt": "x", "completion": "y"}] * 5
    if name == "hf":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        config = chat_config(str(tmp_path / "saved"), dataset="hf")
        with pytest.raises(ConfigError, match='look like format = "instruct"'):
            build_source(config.training, config.data)
        return
    config = chat_config(write_rows(tmp_path, rows, name))
    source: Any = build_source(config.training, config.data)
    (issue,) = source.problems()
    assert issue.key == "data.format" and 'format = "instruct"' in issue.problem
