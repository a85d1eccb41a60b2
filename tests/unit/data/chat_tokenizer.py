"""A tokenizer with the special tokens of many families, and templates that do what theirs do."""

from collections.abc import Iterator

from torchtitan.data.chat_templates import NAMED, find_chat_template

SPECIAL = (
    *("<s>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)
BLANKS = {"\n\n": 256, "  ": 257, "\n": 10}
"""Pairs of blanks are one token, so that a token may lie across the beginning of an answer."""


class ManySpecials:
    """Bytes, two merges, and special tokens."""

    special_ids = {name: 300 + n for n, name in enumerate(SPECIAL)}  # noqa: RUF012
    bos_id = special_ids["<s>"]
    eos_id = special_ids["</s>"]
    folder = None

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        return list(self._ids(text))

    def _ids(self, text: str) -> Iterator[int]:
        while text:
            for merged in ("\n\n", "  "):
                if text.startswith(merged):
                    yield BLANKS[merged]
                    text = text[2:]
                    break
            else:
                yield from text[0].encode()
                text = text[1:]

    def text(self, ids: list[int]) -> str:
        names = {v: k for k, v in self.special_ids.items()} | {256: "\n\n", 257: "  "}
        parts = [names[i].encode() if i in names else bytes([i]) for i in ids]
        return b"".join(parts).decode()


# Each in a few words of our own: what is special about it is in its comment.
LLAMA31 = """{{ '<|begin_of_text|>' }}
{%- if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0].role == 'system' %}{% set own = messages[0].content | trim %}
{%- set messages = messages[1:] %}{% else %}{% set own = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date + '\\n\\n' }}
{{- own + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""  # trims, writes a date

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{%- set first = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- else %}{% set rest = messages %}{% set first = '' %}{% endif %}
{%- for m in rest %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m['role'] == 'user' %}
{{- '<s>' + '[INST] ' + (first if loop.first else '') + m['content'] | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] | trim + ' ' + '</s>' }}{% endif %}
{%- endfor %}"""  # no header before an answer, and blanks of its own around it

GEMMA = """{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""  # renames the role

PHI3 = """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '</s>' }}
{%- endif %}"""  # ends the whole conversation, so nothing but the last turn begins as the whole

QWEN25 = """{% if messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for m in messages if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # a default system

QWEN3 = find_chat_template("qwen3", ManySpecials()).source  # drops the reasoning of earlier turns
THINKING_PROMPT = QWEN25.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
"""Its prompt is not how it writes the turn afterwards."""
TEMPLATES = {
    "llama31": LLAMA31,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "phi3": PHI3,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    **{f"our {name}": find_chat_template(name, ManySpecials()).source for name in NAMED},
}
UNROLLED = ("phi3", "qwen3", "our qwen3")
"""Templates that write earlier turns in another way once others follow."""
