"""Compare steps of LoRA, QLoRA and DoRA with peft's in a plain loop, on a CPU.

    python scripts/bench_lora.py [--steps 9]

All train adapters of all linears in blocks of the same Llama in float32 (dim 512, 8 layers,
vocabulary 32,000, rank 16), on batches of the same shape, with AdamW and clipping. Each kind has a
process of its own; they take turns, a step each. Prints medians: the processor seconds of a step,
the ratio to peft's step of the same turn, the peak of the memory above that at the start, and what
the adapted matrices take, as a multiple of their size in bfloat16.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

DIM, LAYERS, HEADS, FFN, VOCABULARY, RANK = 512, 8, 8, 1536, 32000, 16
BATCH, LENGTH = 4, 512


def ours(handler: str, dora: bool = False) -> Any:
    """Return a function that makes one step of this library's trainer, and the base's size."""
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.handlers.lora import LoraLinear
    from torchtitan.models.batch import Batch
    from torchtitan.optim.optimizer import build_optimizers
    from torchtitan.parallel.grad_clip import clip_gradients, gradient_norm
    from torchtitan.training import builder, model_builder

    args = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "ffn_dim": FFN}
    config = JobConfig.model_validate(
        {
            "model": {"handlers": [handler], "args": {**args, "vocab_size": VOCABULARY}},
            "handlers": {handler: {"rank": RANK, "dora": dora}},
            "training": {"mixed_precision_param": "float32", "seq_len": LENGTH},
            "activation_checkpoint": {"mode": "none"},
        }
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dims, device = ParallelDims(), torch.device("cpu")
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, VOCABULARY, mesh, dims, device)
    model_builder.initialize_added(model)
    model_builder.call_after_load(model)
    optimizers = build_optimizers(config.optimizer, model.parts, device)
    runner = builder.build_runner(config, model, mesh, dims, device)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand_as(tokens)
    batch = Batch(tokens=tokens, labels=tokens, positions=positions, document_ids=positions * 0)

    def step() -> None:
        runner.forward_backward([batch], tokens.numel())
        norm = gradient_norm(model.parameters, 1)
        clip_gradients(model.parameters, norm, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    linears = [m for m in model.parts[0].modules() if isinstance(m, LoraLinear)]
    return step, size_of_base([(m.in_features * m.out_features, m) for m in linears])


def size_of_base(linears: list[tuple[int, torch.nn.Module]]) -> float:
    """Return the bytes of frozen matrices, given with their elements, over those in bfloat16."""
    held = [p for _, m in linears for p in m.parameters(recurse=False) if not p.requires_grad]
    return sum(p.nbytes for p in held) / (2 * sum(elements for elements, _ in linears))


def with_peft(dora: bool) -> Any:
    """Return the same of peft's model in a plain loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": DIM, "num_hidden_layers": LAYERS, "intermediate_size": FFN}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=HEADS, num_key_value_heads=HEADS, **sizes
    )
    settings = LoraConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora
    )
    model = get_peft_model(LlamaForCausalLM(config), settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    linears = [m for n, m in model.named_modules() if n.endswith("proj.base_layer")]
    return step, size_of_base([(m.weight.numel(), m) for m in linears])


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "LoRA": (partial(ours, "lora"), "LoRA of peft"),
    "LoRA of peft": (partial(with_peft, False), "LoRA of peft"),
    "QLoRA": (partial(ours, "qlora"), "LoRA of peft"),
    "DoRA": (partial(ours, "lora", dora=True), "DoRA of peft"),
    "DoRA of peft": (partial(with_peft, True), "DoRA of peft"),
}
"""Settings of a step of each kind, and the kind that it is compared with."""


def measure(kind: str) -> None:
    """Make a step for each line of the input; print its seconds, the peak in MiB, and the base."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, base = KINDS[kind][0]()
    step()  # allocates
    for _ in sys.stdin:
        started = time.process_time()
        step()
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([seconds, (peak - before) / 1024, base]), flush=True)


def take_turns(kinds: Sequence[str], steps: int) -> dict[str, list[list[float]]]:
    """Return what `measure` prints for each kind, of which one at a time computes."""
    processes = {}
    for kind in kinds:
        words = [sys.executable, __file__, "--kind", kind]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes[kind] = subprocess.Popen(words, text=True, **pipes)  # type: ignore[call-overload]
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for turn in range(steps + 1):
        for kind, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            line = next(line for line in process.stdout if line.startswith("["))
            if turn:  # in the first one others may still have been building
                found[kind].append(json.loads(line))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return found


def main() -> None:
    """Measure the kinds in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--kind", choices=KINDS, help="measure this one here, step by step")
    options = parser.parse_args()
    if options.kind:
        measure(options.kind)
        return
    found = take_turns(list(KINDS), options.steps)
    for kind, results in found.items():
        seconds, mib, base = map(statistics.median, zip(*results, strict=True))
        others = found[KINDS[kind][1]]
        ratio = statistics.median(a[0] / b[0] for a, b in zip(results, others, strict=True))
        text = f"{kind:12} {seconds:6.2f} s of the processor a step, {ratio:.2f} of peft's"
        print(f"{text}, {mib:7,.0f} MiB, base {base:.2f} of bfloat16")
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} processors; {options.steps} turns")


if __name__ == "__main__":
    main()
