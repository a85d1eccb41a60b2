"""Chat data that cannot be trained: found by the checks, with file, row and reason.

The numbers are those of the table of bad inputs.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_bad_data import facts_for, only

from tests.chat_data import ChatRun, chat_config, chat_rows, pair_rows, write_rows
from torchtitan import cli
from torchtitan.config import DataError
from torchtitan.data.chat_template import read_chat_template
from torchtitan.data.chat_templates import find_chat_template
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.preflight.data import check_environment as look
from torchtitan.preflight.data import check_static
from torchtitan.training.builder import keep_chat_template


def facts(path: object, **options: Any) -> Any:
    options.setdefault("training__seq_len", 400)
    return facts_for(path, data__format=options.pop("format", "chat"), lanes=4, **options)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_rows(tmp_path, chat_rows(40))


def test_good_data_are_accepted(data: str) -> None:
    assert check_static(facts(data)) == look(facts(data)) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "is neither chatml, llama3, mistral, qwen3 nor a file that can be read: No such"),
        ("{% for m in messages %}", "is not a Jinja template"),
        ("{{ raise_exception('sorry') }}", "sorry"),
        ("{{ messages[0].content.missing.attribute }}", "does not render"),
    ],
)
def test_row_51_chat_templates(
    tmp_path: Path, data: str, template: str | None, message: str
) -> None:
    file = tmp_path / "template.jinja"
    if template is not None:
        file.write_text(template)
    problem = only(look(facts(data, data__chat_template=str(file))))
    assert problem.severity == "error" and message in str(problem)


def test_a_template_without_a_special_end_is_warned_of(tmp_path: Path, data: str) -> None:
    (tmp_path / "t").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    problem = only(look(facts(data, data__chat_template=str(tmp_path / "t"))))
    assert problem.severity == "warning" and "where to stop" in problem.problem


def test_row_57_bad_rows_have_file_row_and_reason(tmp_path: Path) -> None:
    rows = chat_rows(40)
    rows[1] = {"messages": rows[1]["messages"][:1]}
    path = write_rows(tmp_path, rows)
    problem = only(look(facts(path)))
    assert f"{path}:2 " in problem.problem and "ends with a message of the user" in problem.problem
    config = chat_config(path, epochs=1, on_bad_row="skip")
    run = ChatRun(config)
    assert list(run.steps())
    assert sum(state["bad_rows"] for state in run.lane_states.values()) == 1
    run.close()
    run = ChatRun(chat_config(path, epochs=1))
    with pytest.raises(DataError, match=r"data\.jsonl:2 .*ends with a message of the user"):
        list(run.steps())
    run.close()


def test_row_65_nothing_to_learn(tmp_path: Path) -> None:
    rows = chat_rows(40)
    for row in rows:
        for message in row["messages"]:
            message["train"] = False
    path = write_rows(tmp_path, rows)
    problem = only(look(facts(path)))
    assert problem.severity == "warning" and "nothing that is trained" in problem.problem
    with pytest.raises(DataError, match="found no document"):
        ChatRun(chat_config(path)).step()
    run = ChatRun(chat_config(path, epochs=1, seq_len=400))
    assert run.step() is None
    assert run.counts == (0, 0, 40)
    run.close()


STATIC_PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"data__columns": {"mesages": "x"}}, "data.columns.mesages"),
    ({"data__roles": {"customer": "usr"}}, 'data.roles.customer = "usr": is not a role'),
    ({"format": "preference", "data__on_long": "split"}, "a pair cannot be split"),
    ({"format": "preference"}, 'loss.name = "cross_entropy": trains on the rejected'),
    (
        {"format": "preference", "training__document_mask": False, "loss__name": "other"},
        "training.document_mask = false: the two sides",
    ),
    ({"format": "text", "data__train_on": "last"}, "has no meaning for text"),
    (
        {"data__packing": False, "parallelism__pipeline_parallel_degree": 2},
        "pipeline parallelism needs batches of one length",
    ),
    (
        {
            "data__packing": False,
            "data__pad_to_multiple": 6,
            "parallelism__tensor_parallel_degree": 4,
        },
        "data.pad_to_multiple = 6: is not a multiple of 4",
    ),
]


@pytest.mark.parametrize(("options", "message"), STATIC_PROBLEMS)
def test_settings_that_cannot_be(data: str, options: dict[str, Any], message: str) -> None:
    context = facts(data, **options)
    assert message in "\n".join(map(str, check_static(context)))


def test_conversations_are_kept_apart_unless_something_else_is_said(data: str) -> None:
    assert facts(data).config.training.document_mask
    assert not facts(data, training__document_mask=False).config.training.document_mask
    assert not facts(data, data__packing=False).config.training.document_mask
    assert not facts(data, format="text").config.training.document_mask


def test_text_files_hold_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    problem = only(look(facts_for(tmp_path / "a.txt", data__format="chat", lanes=1)))
    assert "needs columns" in problem.problem


def test_conversations_are_not_tokenised_to_files(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--training.dataset_path={data}", "--data.format=chat", "--data.lanes=4"]
    assert cli.main(["tokenize", *words, f"--output={tmp_path / 'out'}"]) == 2
    assert "a folder of tokens has no mask" in capsys.readouterr().err


def test_data_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = chat_rows(60)
    rows[0] = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    rows[1]["messages"][1]["content"] = "y" * 400
    rows[2] = {"messages": []}
    path = write_rows(tmp_path, rows)
    assert cli.main(["data", "show", path, "--samples=1", "--training.seq_len=400"]) == 0
    printed = capsys.readouterr().out
    assert "⟦a<|im_end|><end>⟧" in printed
    assert "⟦a1" not in printed  # one sample was asked for
    assert "cannot be used" in printed and "data.jsonl:3" in printed
    assert "1 row longer than training.seq_len = 400" in printed
    assert "tokens of a row:" in printed and "of them padding" in printed
    pairs = write_rows(tmp_path, pair_rows(5), "pairs.parquet")
    assert cli.main(["data", "show", pairs]) == 0
    assert "format preference" in capsys.readouterr().out
    config = tmp_path / "run.toml"
    config.write_text(f'[training]\ndataset_path = "{path}"\n[data]\nformat = "chat"\n')
    assert cli.main(["data", "show", str(config), "--rows=1", "--data.train_on=all"]) == 0
    assert "all turns trained" in capsys.readouterr().out
    assert cli.main(["data", "show", json.dumps("nothing")]) == 2


def test_a_run_keeps_its_template_for_chat_and_a_resume(tmp_path: Path, data: str) -> None:
    own = tmp_path / "tokenizer"
    shutil.copytree("tests/assets/tokenizer", own)
    tokenizer = build_tokenizer(str(own))
    config = chat_config(data)
    default = find_chat_template(None, tokenizer)
    folder: Any = SimpleNamespace(path=tmp_path)
    keep_chat_template(config, folder, tokenizer)
    messages = chat_rows(1)[0]["messages"]
    assert read_chat_template([own]).render(messages) == default.render(messages)
    assert find_chat_template(None, build_tokenizer(str(own))).source == default.source
    other = tmp_path / "text"
    (other / "tokenizer").mkdir(parents=True)
    keep_chat_template(chat_config(data, format="text"), SimpleNamespace(path=other), tokenizer)  # type: ignore[arg-type]
    assert not list((other / "tokenizer").iterdir())
