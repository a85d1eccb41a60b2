"""Tokens a second of packed and of padded conversations, on a CPU in one process.

    python scripts/bench_packing.py [--rounds 3] [--steps 12] [--section.key value ...]

Trains a small model on made-up conversations whose lengths are spread as in chat data (log-normal),
once several in a sequence with document masks, once one a sequence, in batches of like length that
are padded to a multiple. All tokens are trained, so the targets are the tokens without padding; a
packed batch has as many sequences as give it about as many of them. The two take turns; medians.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEQ_LEN = 512
WARMUP_STEPS = 3
SETTINGS = {
    "--job.config_file": str(ROOT / "train_configs" / "debug_model.toml"),
    "--job.device": "cpu",
    "--training.dataset": "json",
    "--training.seq_len": str(SEQ_LEN),
    "--training.document_mask": "true",
    "--data.format": "chat",
    "--data.train_on": "all",
    "--data.lanes": "4",
    "--lr_scheduler.warmup_steps": "2",
    "--metrics.log_freq": "1",
    "--metrics.enable_tensorboard": "false",
    "--checkpoint.enable": "false",
}
KINDS = {
    "packed": {"--data.packing": "true", "--training.global_batch_size": "4"},
    "padded": {"--data.packing": "false", "--training.global_batch_size": "16"},
}


def write_data(file: Path) -> None:
    """Conversations of some 30 to 500 bytes, most of them short."""
    generator = random.Random(0)
    lines = []
    for _ in range(4000):
        size = min(max(int(generator.lognormvariate(4.4, 0.8)), 10), 420)
        answer = "".join(generator.choices("abcdefgh    ", k=size)) + "."
        messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    file.write_text("".join(lines))


def measure(data: Path, kind: str, steps: int, overrides: list[str]) -> tuple[float, float]:
    """Trained tokens a second after the warmup, and the share of positions that they are."""
    settings = SETTINGS | KINDS[kind]
    settings |= {"--training.steps": str(steps + WARMUP_STEPS)}
    settings |= {"--training.local_batch_size": settings["--training.global_batch_size"]}
    kept = [(flag, value) for flag, value in settings.items() if flag not in overrides]
    words = [*itertools.chain.from_iterable(kept), f"--training.dataset_path={data}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torchtitan.train", *words, "--job.dump_folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if '"loss"' in line]
    first, *measured = records[WARMUP_STEPS - 1 :]
    targets = sum(record["num_targets"] for record in measured)
    seconds = sum(record["step_seconds"] for record in measured)
    positions = measured[-1]["num_tokens_seen"] - first["num_tokens_seen"]
    return targets / seconds, targets / positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measurements")
    parser.add_argument("--steps", type=int, default=12, help="measured after the warmup")
    options, overrides = parser.parse_known_args()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    used: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chat.jsonl"
        write_data(data)
        for _, kind in itertools.product(range(options.rounds), KINDS):
            rate, used[kind] = measure(data, kind, options.steps, overrides)
            rates[kind].append(rate)
    for kind, found in rates.items():
        rate = statistics.median(found)
        print(f"{kind}: {rate:>9,.0f} tokens/s, {used[kind]:.1%} of the positions are tokens")
    ratios = sorted(p / q for p, q in zip(rates["packed"], rates["padded"]))
    print(f"packed / padded: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
