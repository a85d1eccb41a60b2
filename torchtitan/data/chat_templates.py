"""Chat templates by name, and the template of a run's chat data.

The named ones are short versions of what the families use, for tokenizers that come without a
template; none of them writes tools.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.data.chat_template import (
    CONFIG_NAME,
    TEMPLATE_NAME,
    ChatTemplate,
    read_chat_template,
)

KEY = "data.chat_template"
DEFAULT = "chatml"
_TODAY = datetime(2024, 7, 26)
"""The date for templates that write one: the samples of a run must not change with the day. It is
the one that Llama 3's template falls back on."""

_CHATML = """\
{%- for m in messages -%}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' -}}
    {%- if m['role'] == 'assistant' -%}{{- turn_end -}}{%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
_MISTRAL = """\
{{- bos_token -}}
{%- set space = namespace(system='') -%}
{%- for m in messages -%}
    {%- if m['role'] == 'system' -%}
        {%- set space.system = m['content'] + '\\n\\n' -%}
    {%- elif m['role'] == 'user' -%}
        {{- '[INST] ' + space.system + m['content'] + ' [/INST]' -}}
        {%- set space.system = '' -%}
    {%- elif m['role'] == 'assistant' -%}
        {{- ' ' + m['content'] | trim + eos_token -}}
    {%- else -%}
        {{- raise_exception('the mistral template knows system, user and assistant only') -}}
    {%- endif -%}
{%- endfor -%}
"""
_QWEN3 = """\
{%- set query = namespace(last=-1) -%}
{%- for m in messages -%}
    {%- if m['role'] == 'user' -%}{%- set query.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
    {%- set thought, answer = m['reasoning_content'] or '', m['content'] -%}
    {%- if m['role'] == 'assistant' and '</think>' in answer -%}
        {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
        {%- set answer = answer.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>' + m['role'] + '\n' -}}
    {%- if m['role'] == 'assistant' and loop.index0 > query.last -%}
        {{- '<think>\n' + thought + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- answer + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
NAMED = {"chatml": _CHATML, "llama3": _LLAMA3, "mistral": _MISTRAL, "qwen3": _QWEN3}
"""`data.chat_template` -> the template."""


def find_chat_template(setting: str | None, tokenizer: Any) -> ChatTemplate:
    """Return the template of a run: a named one, a file, or (None) the tokenizer's, else ChatML.

    Raises ConfigError for one that is missing, or that Jinja cannot read.
    """
    variables = _variables(tokenizer)
    if setting in NAMED:
        return _named(setting, variables, tokenizer, f'data.chat_template = "{setting}"')
    try:
        if setting is None:
            folder: Path | None = getattr(tokenizer, "folder", None)
            if folder is None or not _has_template(folder):
                return _named(DEFAULT, variables, tokenizer, f"the default, {DEFAULT}")
            found = read_chat_template([folder])
            return ChatTemplate(
                found.source, {**variables, **found.variables}, found.origin, _TODAY
            )
        source = Path(setting).read_text(encoding="utf-8-sig")
        return ChatTemplate(source, variables, setting, _TODAY)
    except ConfigError as error:
        problems = [
            ConfigIssue(KEY, f"{issue.value}: {issue.problem}", _FIX, setting)
            for issue in error.problems
        ]
        raise ConfigError(problems) from None
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = f"is neither {', '.join(sorted(NAMED))} nor a file that can be read: {reason}"
        raise ConfigError(ConfigIssue(KEY, problem, "correct it", setting)) from None


def _named(name: str, variables: dict[str, str], tokenizer: Any, origin: str) -> ChatTemplate:
    """Return a named template, with the special tokens in it: it will do without its tokenizer."""
    tokens = dict(variables)
    if name == DEFAULT:  # where <|im_end|> is ordinary text, an end token must follow it
        is_special = "<|im_end|>" in getattr(tokenizer, "special_ids", {})
        tokens["turn_end"] = "" if is_special else variables["eos_token"]
    head = "".join(
        f"{{%- set {key} = {json.dumps(text)} -%}}\n"
        for key, text in tokens.items()
        if key in NAMED[name]
    )
    return ChatTemplate(head + NAMED[name], {}, origin, _TODAY)


_FIX = f"correct the template, or set one of {', '.join(sorted(NAMED))}"


def _has_template(folder: Path) -> bool:
    if (folder / TEMPLATE_NAME).is_file():
        return True
    config = folder / CONFIG_NAME
    return config.is_file() and '"chat_template"' in config.read_text("utf-8", errors="replace")


def _variables(tokenizer: Any) -> dict[str, str]:
    """Return the texts of the special tokens that templates name."""
    special: dict[str, int] = getattr(tokenizer, "special_ids", {})
    names = {number: text for text, number in special.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {name: names.get(number, "") for name, number in ids.items()}
