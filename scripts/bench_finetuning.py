"""Measure the cost and the gain of fine-tuning SmolLM2-135M-Instruct on a made-up notation.

    python scripts/bench_finetuning.py [--kinds lora full dpo] [--steps 50]

Runs docs/examples/finetuning.toml as it is, with all weights trained, and on pairs with DPO, in the
root of the clone, each in a process of its own; needs .cache/smollm2 (scripts/make_smollm2.py) and
the extra `eval`. Prints a row for each: the loss on the held-out rows; the share of held-out orders
that the model answers to the letter or, for DPO, of held-out pairs whose right answer has the
larger reward; the processor seconds of training, and the peak of its memory. --steps is for DPO.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = "docs/examples/finetuning.toml"
PAIRS = {
    "data.format": "preference",
    "loss.name": "dpo",
    "loss.args.reference": "base",
    "optimizer.lr": "5e-4",
    "training.local_batch_size": "1",
    "training.global_batch_size": "2",
    "validation.freq": "1000",  # at the end
}
KINDS: dict[str, dict[str, str]] = {
    "lora": {},
    "full": {"model.handlers": "[]", "optimizer.lr": "2e-4"},
    "dpo": PAIRS,
}


def torchtitan(*words: str) -> Any:
    """Run a command; return what it used."""
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-m", "torchtitan", *words], dict(os.environ)
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"torchtitan {' '.join(words)} failed")
    return usage


def make_data(folder: Path, *more: str) -> dict[str, str]:
    """Write the data; return the settings that name them."""
    script = [sys.executable, "scripts/make_chat_data.py", str(folder)]
    subprocess.run([*script, "--parquet", "--rows", "300", *more], check=True)
    return {
        "training.dataset_path": str(folder / "train.parquet"),
        "validation.dataset_path": str(folder / "held_out.parquet"),
    }


def exact_match(run: Path) -> float:
    """Return the share of right answers, by the task of docs/examples/tasks."""
    output = run / "orders.json"
    words = ["evaluate", str(run), "--tasks", "orders", "--task-dir", "docs/examples/tasks"]
    torchtitan(*words, "--apply-chat-template", "--output", str(output))
    return float(json.loads(output.read_text())["results"][0]["value"])


def measure(kind: str, steps: int, folder: Path) -> dict[str, float]:
    """Train and evaluate one kind."""
    settings = {"job.dump_folder": str(folder / kind), **KINDS[kind]}
    if kind == "dpo":
        settings |= {"training.steps": str(steps), **make_data(folder / "pairs", "--pairs")}
    usage = torchtitan("train", CONFIG, *(f"--{name}={value}" for name, value in settings.items()))
    lines = (folder / kind / "metrics.jsonl").read_text().splitlines()
    record = [row for row in map(json.loads, lines) if "validation/validation/loss" in row][-1]
    right = "validation/validation/rewards/accuracies"
    return {
        "loss": record["validation/validation/loss"],
        "accuracy": record[right] if kind == "dpo" else exact_match(folder / kind),
        "seconds": usage.ru_utime + usage.ru_stime,
        "mib": usage.ru_maxrss / 1024,
    }


def main() -> None:
    """Measure the kinds in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=50, help="steps of DPO")
    options = parser.parse_args()
    os.chdir(ROOT)
    make_data(Path("outputs/chat_data"))  # where the config and the task read it
    rows = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(prefix="bench-finetuning-") as folder:
            rows.append((kind, measure(kind, options.steps, Path(folder))))
    print("\n| | held-out loss | held-out accuracy | processor seconds | MiB |")
    print("|---|---:|---:|---:|---:|")
    for kind, row in rows:
        figures = f"{row['loss']:.4f} | {row['accuracy']:.2f} | {row['seconds']:.0f}"
        print(f"| {kind} | {figures} | {row['mib']:,.0f} |")


if __name__ == "__main__":
    main()
