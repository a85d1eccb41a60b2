"""What our step costs over a plain PyTorch loop, on a CPU in one process.

    python scripts/bench_overhead.py [--pairs 9] [--steps 30] [--section.key value ...]

Trains the same model on batches of the same shape, with the same precision scheme (float32 weights
and optimizer, compute in bfloat16), threads and allocator, in three ways:

    ours   `python -m torchtitan.train`, with data, metrics and all
    plain  the loop that one would write by hand, its batches waiting in memory
    fsdp2  the plain loop with FSDP2 around blocks and model, as our run has it

Every measurement is a process of its own. They take turns, and the ratios are taken within a round,
so that a machine that becomes slower or faster in between does not matter; the medians are printed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.config import JobConfig
from torchtitan.config.load import load_config
from torchtitan.utils.host import spin_briefly, tune_cpu_allocator

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchtitan.models.batch import Batch

ROOT = Path(__file__).parents[1]
WARMUP_STEPS = 10
THREADS = 2
SETTINGS = {
    "--job.config_file": str(ROOT / "train_configs" / "debug_model.toml"),
    "--job.device": "cpu",
    "--debug.threads": str(THREADS),
    "--model.args.vocab_size": "2048",
    "--training.seq_len": "512",
    "--training.mixed_precision_param": "bfloat16",
    "--training.global_batch_size": "8",
    "--training.local_batch_size": "8",
    "--lr_scheduler.warmup_steps": "5",
    "--metrics.log_freq": str(WARMUP_STEPS),
    "--metrics.enable_tensorboard": "false",
    "--checkpoint.enable": "false",
}


def run_arguments(steps: int, overrides: list[str]) -> list[str]:
    """Arguments of a run of `steps` steps after the warmup; what `overrides` sets, it decides."""
    settings = SETTINGS | {"--training.steps": str(steps + WARMUP_STEPS)}
    kept = [(flag, value) for flag, value in settings.items() if flag not in overrides]
    return [*itertools.chain.from_iterable(kept), *overrides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=9, help="rounds of measurements")
    parser.add_argument("--steps", type=int, default=30, help="measured after the warmup")
    parser.add_argument("--worker", choices=["plain", "fsdp2"], help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    arguments = run_arguments(options.steps, overrides)
    if options.worker:
        print(measure_loop(load_config(arguments).config, with_fsdp2=options.worker == "fsdp2"))
        return
    rounds = []
    for number in range(1, options.pairs + 1):
        rates = {
            "ours": run_ours(arguments),
            "plain": run_worker("plain", options.steps, overrides),
            "fsdp2": run_worker("fsdp2", options.steps, overrides),
        }
        rounds.append(rates)
        text = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        print(f"round {number}: {text} tokens/s", flush=True)
    report(rounds)


def report(rounds: list[dict[str, float]]) -> None:
    """Medians of the rates, tokens a second, and of the ratios within a round."""
    for name in rounds[0]:
        rate = statistics.median(rates[name] for rates in rounds)
        print(f"{name:<6}{rate:>10,.0f} tokens/s")
    for name, other in (("ours", "plain"), ("fsdp2", "plain"), ("ours", "fsdp2")):
        ratios = sorted(rates[name] / rates[other] for rates in rounds)
        median = statistics.median(ratios)
        print(f"{name} / {other}: {median:.3f}  (from {ratios[0]:.3f} to {ratios[-1]:.3f})")


def run_ours(arguments: list[str]) -> float:
    """Tokens a second of a training run, after `WARMUP_STEPS` steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torchtitan.train", *arguments]
        run_quietly([*command, "--job.dump_folder", folder])
        return rate_of(Path(folder))


def rate_of(folder: Path) -> float:
    """Tokens a second of the finished run in `folder`, after `WARMUP_STEPS` steps."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if record["step"] >= WARMUP_STEPS]
    tokens = measured[-1]["num_tokens_seen"] - measured[0]["num_tokens_seen"]
    seconds = sum(
        (after["step"] - before["step"]) * after["step_seconds"]
        for before, after in itertools.pairwise(measured)
    )
    return tokens / seconds


def run_worker(kind: str, steps: int, overrides: list[str]) -> float:
    command = [sys.executable, __file__, "--worker", kind, "--steps", str(steps), *overrides]
    return float(run_quietly(command).split()[-1])


def run_quietly(command: list[str]) -> str:
    """Standard output of a command that must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr}")
    return run.stdout


def measure_loop(config: JobConfig, with_fsdp2: bool) -> float:
    """Tokens a second of the plain loop, after `WARMUP_STEPS` steps."""
    spin_briefly()
    if config.debug.cpu_allocator == "tuned":
        tune_cpu_allocator()
    import time

    import torch

    torch.set_num_threads(THREADS)
    batches = read_batches(config)
    step = (fsdp2_step if with_fsdp2 else plain_step)(config)
    for batch in batches[:WARMUP_STEPS]:
        step(batch)
    start = time.perf_counter()
    for batch in batches[WARMUP_STEPS:]:
        step(batch)
    seconds = time.perf_counter() - start
    measured = len(batches) - WARMUP_STEPS
    return measured * config.training.local_batch_size * config.training.seq_len / seconds


def read_batches(config: JobConfig) -> list["Batch"]:
    """The batches that our run trains on, read before the clock runs."""
    from torchtitan.data.loader import LanePlan, build_loader
    from torchtitan.data.tokenizers import build_tokenizer

    size = config.training.local_batch_size
    loader = build_loader(
        config.training,
        config.data,
        config.debug.seed,
        build_tokenizer(config.model.tokenizer_path),
        LanePlan(size, 1, 0, size, size),
        None,
    )
    batches = [loader.next_step().microbatches[0] for _ in range(config.training.steps)]
    loader.close()
    return batches


def build_model(config: JobConfig) -> "nn.Module":
    """The model, with float32 weights of PyTorch's own initialisation."""
    from torchtitan.data.tokenizers import build_tokenizer
    from torchtitan.models.registry import get_family

    family = get_family(config.model.name)
    vocab_size = build_tokenizer(config.model.tokenizer_path).vocab_size
    return family.build(family.resolve(config.model, vocab_size))


def mean_loss(model: "nn.Module", batch: "Batch") -> "Tensor":
    import torch.nn.functional as F

    logits = model.head(model(batch["tokens"], batch["positions"]))
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())


def build_adamw(parameters: list["nn.Parameter"], config: JobConfig) -> "torch.optim.Optimizer":  # type: ignore[name-defined] # noqa: F821
    import torch

    betas = (config.optimizer.beta1, config.optimizer.beta2)
    return torch.optim.AdamW(parameters, lr=config.optimizer.lr, betas=betas, fused=True)


def plain_step(config: JobConfig) -> Callable[["Batch"], None]:
    """Float32 weights beside a bfloat16 copy that computes, and is refreshed once a step."""
    import copy

    import torch

    master = build_model(config)
    model = copy.deepcopy(master).bfloat16()
    weights, copies = list(master.parameters()), list(model.parameters())
    optimizer = build_adamw(weights, config)

    def step(batch: "Batch") -> None:
        mean_loss(model, batch).backward()
        for weight, low in zip(weights, copies):
            weight.grad, low.grad = low.grad.float(), None
        torch.nn.utils.clip_grad_norm_(weights, config.training.max_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)

    return step


def fsdp2_step(config: JobConfig) -> Callable[["Batch"], None]:
    """The same precision by FSDP2, on a mesh of one process."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = build_model(config)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in model.wrap_units():
        fully_shard(list(unit.modules), mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = build_adamw(list(model.parameters()), config)

    def step(batch: "Batch") -> None:
        optimizer.zero_grad()
        mean_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
