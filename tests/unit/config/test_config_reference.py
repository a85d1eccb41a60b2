"""docs/reference/settings.md, --help and the schema know every key and repeat the sections."""

import re
from pathlib import Path

import pytest

from torchtitan.commands.config import json_schema, reference
from torchtitan.config.fields import known_keys, known_sections
from torchtitan.config.help_text import print_help
from torchtitan.handlers.registry import HANDLERS
from torchtitan.loss.registry import LOSSES

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "settings.md"


@pytest.fixture(autouse=True)
def only_what_the_library_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test files, imported into the same process, register handlers and losses."""
    for registered in (HANDLERS._registered, LOSSES._registered):
        for name in [name for name, (_, origin) in registered.items() if "tests." in origin]:
            monkeypatch.delitem(registered, name)


def test_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run scripts/make_config_docs.py"


def test_every_key_and_section_says_what_it_is():
    assert [name for name, key in known_keys().items() if len(key.doc) < 8] == []
    assert [name for name, doc in known_sections().items() if len(doc) < 8] == []


@pytest.mark.parametrize("section", known_sections())
def test_page_has_a_row_for_each_key(section: str):
    keys = [key for key in known_keys().values() if key.section == section]
    text = reference()
    body = text.partition(f"## [{section}]")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE)[: len(keys)] == [
        key.last_name for key in keys
    ]
    for key in keys:
        assert key.doc.replace("|", "\\|") in body


def test_page_has_the_settings_of_models_and_handlers():
    text = reference()
    model = text.partition("## [model.args] of llama3")[2].partition("\n## ")[0]
    assert "| `n_layers` | integer > 0" in model
    compile_ = text.partition("### [handlers.compile]")[2].partition("\n## ")[0]
    assert '| `backend` | `"inductor"`, ' in compile_


def test_help_has_a_flag_for_each_key(capsys: pytest.CaptureFixture[str]):
    print_help()
    text = capsys.readouterr().out
    assert [name for name in known_keys() if f"--{name}" not in text] == []


def test_schema_refuses_unknown_keys_and_carries_the_docs():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    training = schema["$defs"]["Training"]  # type: ignore[index]
    assert training["additionalProperties"] is False
    assert training["properties"]["steps"]["description"].startswith(
        "Optimizer steps of the whole run."
    )
