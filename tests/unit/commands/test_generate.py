"""`torchtitan generate` and `chat`: files, pipes, meshes, and what is rejected before loading."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import CONFIG, execute
from tests.foreign import args_of, random_weights, write_hf
from torchtitan.cli import main
from torchtitan.generation.generate import Generator

MODULE = [sys.executable, "-m", "torchtitan"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "torchtitan"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a tiny model of bytes, with steps 4 and 8."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(CONFIG)
    words = ["train", "config.toml", "--job.dump_folder=out", "--training.steps=8"]
    done = execute([*MODULE, *words, "--model.args.max_seq_len=64"], {}, folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def generate(*words: str, launcher: list[str] = MODULE, command: str = "generate") -> Any:
    done = execute([*launcher, command, *words], {})
    assert done.returncode == 0, done.stderr
    return done


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "mesh",
    [
        "--data-parallel-shard-degree=2",
        pytest.param("--tensor-parallel-degree=2", marks=pytest.mark.nightly),
        pytest.param("--tensor-parallel-degree=1", marks=pytest.mark.nightly),  # two copies
    ],
)
def test_files_on_a_mesh(run_folder: Path, tmp_path: Path, mesh: str) -> None:
    lines = [{"prompt": "def f" * n, "id": n} for n in (1, 3, 2)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    words = [str(run_folder), "--input", str(tmp_path / "in.jsonl"), "--max-new-tokens=9"]
    words += ["--temperature=1", "--top-k=50", "--output"]
    done = generate(*words, str(tmp_path / "alone.jsonl"))
    assert "The newest step" in done.stderr and "step-8" in done.stderr
    alone = rows(tmp_path / "alone.jsonl")
    assert [{k: row[k] for k in ("prompt", "id")} for row in alone] == lines
    assert [row["prompt_tokens"] for row in alone] == [6, 16, 11]  # and a start token
    assert {row["finish_reason"] for row in alone} <= {"length", "eos"}
    assert all(row["completion_tokens"] <= 9 for row in alone)
    file = tmp_path / "mesh.jsonl"
    generate(*words, str(file), mesh, "--batch-size=1", launcher=TORCHRUN)
    assert rows(file) == alone


def test_prompts_of_the_command_line(run_folder: Path) -> None:
    step = str(run_folder / "checkpoint" / "step-4")
    one = generate(step, "--max-new-tokens=5", "abc").stdout
    assert one.endswith("\n")
    both = generate(step, "abc", "--max-new-tokens", "5", "x\ny").stdout
    assert both.startswith(f"> abc\n{one}\n> x\n> y\n")
    piped = generate(step, "abc", "--output=-", "--max-new-tokens=5", "--stop=zzz").stdout
    assert json.loads(piped)["completion"] == one[:-1]


def test_an_output_is_complete_or_has_another_name(
    run_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that was ended leaves the answers that it had, and the next one can start."""
    file, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    words = [str(run_folder), "a", "b", "c", "--batch-size=1", "--max-new-tokens=3", "--output"]
    whole, count = Generator.generate, 0

    def interrupted(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(Generator, "generate", interrupted)
    assert main(["generate", *words, str(file)]) != 0
    assert len(rows(partial)) == 2 and not file.exists()
    capsys.readouterr()
    assert main(["generate", *words, str(file)]) == 0
    assert f"notice: {partial}" in capsys.readouterr().err
    assert len(rows(file)) == 3 and not partial.exists()


def test_weights_that_are_not_finite_are_named(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree("tests/assets/tokenizer", folder)
    args = args_of(n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=2048)
    weights = random_weights(args)
    weights["layers.1.attention.wq.weight"][3, 4] = 1e6
    write_hf(folder, weights, args)
    words = ["generate", str(folder), "a", "--max-new-tokens=1"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--dtype=float16"]) == 5  # its largest number is 65504
    text = capsys.readouterr().err
    assert "NaN or infinity in torch.float16: layers.1.attention.wq.weight" in text


def rejected(capsys: Any, *words: str, command: str = "generate") -> str:
    assert main([command, *words]) == 2
    return str(capsys.readouterr().err)


def test_what_is_wrong_is_named(run_folder: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint, file = str(run_folder), tmp_path / "in.jsonl"
    assert "PROMPT: is missing" in rejected(capsys, checkpoint)
    assert "PROMPT 2: is empty" in rejected(capsys, checkpoint, "a", "")
    assert "does not exist" in rejected(capsys, str(tmp_path / "no"), "a")
    assert "--dtype" in rejected(capsys, checkpoint, "a", "--dtype=float8")
    assert "--top-p = 2.0" in rejected(capsys, checkpoint, "a", "--top-p=2")
    assert "has 64 tokens" in rejected(capsys, checkpoint, "x" * 63)
    assert "exists already" in rejected(capsys, checkpoint, "a", "--output", checkpoint)
    nowhere = str(tmp_path / "no" / "out")
    assert "folder does not exist" in rejected(capsys, checkpoint, "a", "--output", nowhere)
    assert "chat template: is missing" in rejected(capsys, checkpoint, "a", "--chat")
    assert "chat template: is missing" in rejected(capsys, checkpoint, command="chat")
    wrong = rejected(capsys, checkpoint, "a", "--tensor-parallel-degree=3")
    assert "--tensor-parallel-degree = 3" in wrong and "1 processes" in wrong
    for text, message in (
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt"', "in.jsonl:2: is not JSON"),
        ("7", "in.jsonl:1: is not an object"),
        ('{"text": "a"}', "has not exactly one of prompt and messages"),
        ('{"prompt": 7}', "its prompt is no text"),
        ('{"messages": []}', "messages is not a list"),
        ('{"prompt": ""}', "in.jsonl:1: is empty"),
    ):
        file.write_text(text)
        assert message in rejected(capsys, checkpoint, "--input", str(file))
    assert "--input" in rejected(capsys, checkpoint, "--input", str(tmp_path / "none"))
    assert "does not apply to --input" in rejected(capsys, checkpoint, "--input=x", "--chat")


def test_a_damaged_step_is_named(run_folder: Path, tmp_path: Path, capsys: Any) -> None:
    step = shutil.copytree(run_folder / "checkpoint" / "step-4", tmp_path / "step-4")
    shard = max(step.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["generate", str(step), "abc"]) == 4
    assert shard.name in capsys.readouterr().err
    (step / "manifest.json").write_text("{}")
    assert main(["generate", str(step), "abc"]) == 4
    assert "manifest.json" in capsys.readouterr().err


def chat(checkpoint: Path, text: str, *words: str, launcher: list[str] = MODULE) -> Any:
    command = [sys.executable, *launcher[1:], "chat", str(checkpoint), *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def test_a_conversation_over_a_pipe(smollm2: Path) -> None:
    text = (
        "What is the capital of France?\nAnd of Italy?\n/no\n\n/reset\nAnd of Italy?\n/exit\nHi\n"
    )
    done = chat(smollm2, text, "--temperature=0", "--max-new-tokens=10")
    first, second, third = done.stdout.splitlines()[:3]
    assert first == "The capital of France is Paris."
    assert second == "The capital of Italy is Rome."
    assert third != second  # it was forgotten what about Italy was asked
    assert "/no is not a command" in done.stderr
    assert "starts anew" in done.stderr


TEMPLATE = """{% for m in messages %}{{ m['role'][0] + m['content'] }}
{% endfor %}{% if add_generation_prompt %}a{% endif %}"""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a template, whose longest sequence is 48 tokens."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree("tests/assets/tokenizer", folder)
    args = args_of(n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=2048, max_seq_len=48)
    write_hf(folder, random_weights(args), args)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_conversation_on_a_mesh(chat_model: Path) -> None:
    text, words = "Hello\nHow are you?\n/exit\n", ["--temperature=0", "--max-new-tokens=6"]
    alone = chat(chat_model, text, *words)
    both = chat(chat_model, text, *words, "--tensor-parallel-degree=2", launcher=TORCHRUN)
    assert len(alone.stdout.split()) >= 2
    assert both.stdout == alone.stdout


def test_the_oldest_turns_are_forgotten(
    chat_model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one two three\n" * 4 + "word " * 60 + "\nfour\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["chat", str(chat_model), "--temperature=0", "--max-new-tokens=16"]) == 0
    printed = capsys.readouterr()
    assert "The oldest 2 turns are forgotten" in printed.err
    assert "which leave no room in the model's 48" in printed.err
    assert printed.err.index("leave no room") < printed.err.rindex("Cut off after 16 tokens")
