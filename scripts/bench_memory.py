"""What the options that save memory save, and what they cost, on this machine in one process.

    python scripts/bench_memory.py [--rounds 5] [--steps 6] [--device cpu] [--section.key value ...]

Two models are trained by `python -m torchtitan.train`: one whose activations take most of the
memory (small, on many tokens), and one whose parameters do (large, on few). Every measurement is a
process of its own. The options take turns, and ratios to the run without any are taken within a
round, so that a machine that becomes slower or faster in between does not matter; medians are
printed. On a CPU memory is the highest resident memory of the process, with what Python and torch
take; on CUDA it is what tensors take at most.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARMUP_STEPS = 2
COMMON = {
    "--job.config_file": str(ROOT / "train_configs" / "debug_model.toml"),
    "--debug.threads": "2",
    # What the tuned one was once given stays with the process, in pieces that do not always fit.
    "--debug.cpu_allocator": "system",
    "--model.args.vocab_size": "2048",
    "--training.max_norm": "inf",
    "--training.global_batch_size": "-1",
    "--activation_checkpoint.mode": "none",
    "--lr_scheduler.warmup_steps": "1",
    "--metrics.log_freq": "1",
    "--metrics.enable_tensorboard": "false",
    "--checkpoint.enable": "false",
}
MODELS = {
    "activations": {
        "--model.args.dim": "256",
        "--model.args.n_layers": "8",
        "--training.seq_len": "512",
        "--training.local_batch_size": "8",
    },
    "parameters": {
        "--model.args.dim": "1024",
        "--model.args.n_layers": "8",
        "--training.seq_len": "64",
        "--training.local_batch_size": "1",
    },
}
OPERATORS = {
    "--activation_checkpoint.mode": "selective",
    "--activation_checkpoint.selective_ac_option": "op",
}
COMPILED = {"--model.handlers": "compile"}
BUDGET = {**COMPILED, "--activation_checkpoint.mode": "memory_budget"}
OFFLOAD = {"--activation_checkpoint.offload": "true"}
OPTIONS: dict[str, dict[str, dict[str, str]]] = {
    "activations": {
        "no option": {},
        'mode = "full"': {"--activation_checkpoint.mode": "full"},
        'selective_ac_option = "op"': OPERATORS,
        "compiled": COMPILED,
        "memory_budget = 0.5": {**BUDGET, "--activation_checkpoint.memory_budget": "0.5"},
        "memory_budget = 0.1": {**BUDGET, "--activation_checkpoint.memory_budget": "0.1"},
        "offload": OFFLOAD,
        'mode = "full", offload': {**OFFLOAD, "--activation_checkpoint.mode": "full"},
    },
    "parameters": {
        "no option": {},
        "early_step_in_backward": {"--optimizer.early_step_in_backward": "true"},
        "enable_cpu_offload": {"--training.enable_cpu_offload": "true"},
    },
}
CUDA_ONLY = ("offload", 'mode = "full", offload', "enable_cpu_offload")
"""On a CPU they have nothing to save."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="of measurements of every option")
    parser.add_argument("--steps", type=int, default=6, help="measured after the warmup")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(MODELS), help="one of the two models only")
    options, overrides = parser.parse_known_args()
    for model in [options.model] if options.model else MODELS:
        chosen = {
            name: settings
            for name, settings in OPTIONS[model].items()
            if options.device == "cuda" or name not in CUDA_ONLY
        }
        rounds = []
        for number in range(1, options.rounds + 1):
            measured = {}
            for name, settings in chosen.items():
                every = COMMON | MODELS[model] | settings | {"--job.device": options.device}
                measured[name] = measure(every, options.steps, overrides)
            rounds.append(measured)
            print(f"{model}, round {number} of {options.rounds}", file=sys.stderr, flush=True)
        report(model, rounds)


def measure(settings: dict[str, str], steps: int, overrides: list[str]) -> tuple[float, float]:
    """Peak memory in MiB and median seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings | {
            "--training.steps": str(WARMUP_STEPS + steps),
            "--job.dump_folder": folder,
        }
        arguments = [word for pair in settings.items() for word in pair] + overrides
        run = subprocess.run(
            [sys.executable, "-m", "torchtitan.train", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        if run.returncode:
            sys.exit(f"{' '.join(arguments)} failed:\n{run.stderr}")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    seconds = statistics.median(record["step_seconds"] for record in records[WARMUP_STEPS:])
    return max(map(peak_mib, records)), seconds


def peak_mib(record: dict[str, Any]) -> float:
    """What tensors take, where the device knows."""
    return 1024 * float(record.get("memory_active_gib", record["memory_peak_gib"]))


def report(model: str, rounds: list[dict[str, tuple[float, float]]]) -> None:
    """Medians, and medians of the ratios within a round, as a table."""
    print(f"\nA model whose {model} take most of the memory:\n")
    print("| option | peak memory, MiB | of that without | seconds a step | of that without |")
    print("|---|---|---|---|---|")
    for name in rounds[0]:
        cells = []
        for index, form in enumerate(("{:,.0f}", "{:.3f}")):
            cells.append(form.format(statistics.median(one[name][index] for one in rounds)))
            ratios = sorted(one[name][index] / one["no option"][index] for one in rounds)
            median = statistics.median(ratios)
            cells.append(f"{median:.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
