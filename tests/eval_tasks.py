"""Tasks for lm-eval, made from local files: multiple choice, a perplexity, and generated text."""

import json
from pathlib import Path
from typing import Any

NAMES = ["capitals", "prose", "answers"]
CAPITALS = [("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome"), ("Peru", "Lima")]
_DATA = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}", train: "{file}"}}}}
test_split: test
fewshot_split: train
"""
_CAPITALS = """\
task: capitals
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_PROSE = """\
task: prose
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
_ANSWERS = """\
task: answers
output_type: generate_until
doc_to_text: "Question: What is the capital of {{country}}?\\nAnswer:"
doc_to_target: " {{capital}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8}
metric_list: [{metric: exact_match, ignore_case: true}]
"""


def write_tasks(folder: Path, num_capitals: int = len(CAPITALS), prose_words: int = 30) -> Path:
    """Write data and YAML files; return the folder of the latter."""
    choices = [capital for _, capital in CAPITALS]
    capitals = [
        {"country": country, "capital": capital, "label": n, "choices": [*choices, "a long river"]}
        for n, (country, capital) in enumerate(CAPITALS[:num_capitals])
    ]
    prose = [{"text": "Once upon a time, there was a cat. " * n} for n in (1, prose_words // 8)]
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, yaml, rows in (
        ("capitals", _CAPITALS, capitals),
        ("prose", _PROSE, prose),
        ("answers", _ANSWERS, capitals),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tasks / f"{name}.yaml").write_text(yaml + _DATA.format(file=file))
    return tasks


def record(model: Any) -> list[tuple[Any, Any]]:
    """Return a list that gets the (arguments, answer) of each request to a model of lm-eval's."""
    found: list[tuple[Any, Any]] = []

    def recording(answer: Any) -> Any:
        def answered(requests: Any) -> Any:
            answers = answer(requests)
            found.extend((r.args, a) for r, a in zip(requests, answers, strict=True))
            return answers

        return answered

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, kind, recording(getattr(model, kind)))
    return found
