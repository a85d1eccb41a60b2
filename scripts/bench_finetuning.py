"""Measure the cost and the gain of fine-tuning SmolLM2-135M-Instruct on a made-up notation.

    python scripts/bench_finetuning.py [--kinds lora full qlora dpo]

Runs docs/examples/finetuning.toml as it is, with all weights trained, with the base in 4 bits, and
50 steps on pairs with DPO, in the root of the clone, each in a process of its own; needs
.cache/smollm2 (scripts/make_smollm2.py) and the extra `eval`. Prints a row for each as soon as it
is measured: the loss on the held-out rows; the share of held-out orders that the model answers to
the letter or, for DPO, of held-out pairs whose right answer has the larger reward; the processor
seconds of the command, evaluation included, and the peak of its memory. A kind that fails is named,
the others go on, and the exit status is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "docs/examples/finetuning.toml"
DATA = Path("outputs/chat_data")  # where the config and the task read it
LOSS = "validation/loss"
EXACT_MATCH = "evaluation/orders/exact_match"
REWARDS = "validation/rewards/accuracies"
KINDS: dict[str, dict[str, str]] = {
    "lora": {},
    "full": {"model.handlers": "[]", "optimizer.lr": "2e-4"},
    "qlora": {
        "model.handlers": "qlora",
        "handlers.qlora.rank": "8",
        "handlers.qlora.alpha": "16",
    },
    "dpo": {
        "data.format": "preference",
        "data.packing": "false",
        "data.pad_to_multiple": "8",
        "loss.name": "dpo",
        "loss.args.reference": "base",
        "optimizer.lr": "5e-4",
        "training.steps": "50",
        "validation.freq": "50",
        "evaluation.tasks": "[]",
    },
}


def make_data(folder: Path, *more: str) -> dict[str, str]:
    """Write the data; return the settings that name them."""
    script = [sys.executable, "scripts/make_chat_data.py", str(folder)]
    subprocess.run([*script, "--parquet", "--rows", "200", *more], check=True)
    return {
        "training.dataset_path": str(folder / "train.parquet"),
        "validation.dataset_path": str(folder / "held_out.parquet"),
    }


def measure(kind: str, folder: Path) -> str:
    """Train and evaluate one kind; return its row of the table. Raises RuntimeError."""
    data = make_data(folder / "pairs", "--pairs") if kind == "dpo" else {}
    settings = {"job.dump_folder": str(folder / "run"), **KINDS[kind], **data}
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "torchtitan", "train", CONFIG, *words]
    to_stderr = (os.POSIX_SPAWN_DUP2, 2, 1)  # the run's lines, which show how far it is
    pid = os.posix_spawn(sys.executable, command, dict(os.environ), file_actions=[to_stderr])
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"ended with status {os.waitstatus_to_exitcode(status)}")
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    values = {name: value for record in records for name, value in record.items()}
    accuracy = values[REWARDS if kind == "dpo" else EXACT_MATCH]
    seconds, mib = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    result = f"{values['step']} | {values[LOSS]:.4f} | {accuracy:.2f}"
    return f"| {kind} | {result} | {seconds:.0f} | {mib:,.0f} |"


def main() -> int:
    """Measure the kinds in turn and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    os.chdir(ROOT)
    make_data(DATA)
    print("| | steps | held-out loss | held-out accuracy | processor seconds | MiB |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    failed = 0
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(prefix="bench-finetuning-") as folder:
            try:
                print(measure(kind, Path(folder)), flush=True)
            except RuntimeError as error:
                print(f"{kind}: {error}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
