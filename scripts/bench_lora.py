"""Compare a LoRA step with one of peft in a plain loop, on a CPU in one process.

    python scripts/bench_lora.py [--rounds 3] [--steps 4] [--dora]

`lora`, `qlora` and peft train adapters of all linears in blocks of the same Llama in float32 (dim
512, 8 layers, vocabulary 32,000, rank 16), on batches of the same shape, with AdamW and clipping. A
measurement is a process of its own; they take turns. Prints the processor seconds of a step, of all
threads, the peak of the memory above that at the start, and what the adapted matrices take, as a
multiple of their size in bfloat16.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

DIM, LAYERS, HEADS, FFN, VOCABULARY, RANK = 512, 8, 8, 1536, 32000, 16
BATCH, LENGTH = 4, 512


def ours(dora: bool, handler: str = "lora") -> Any:
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


KINDS = {"lora": ours, "qlora": partial(ours, handler="qlora"), "peft": with_peft}


def measure(kind: str, steps: int, dora: bool) -> dict[str, float]:
    """Run one kind in this process; seconds of a step and MiB."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, base = KINDS[kind](dora)
    step()  # allocates
    started = time.process_time()
    for _ in range(steps):
        step()
    seconds = (time.process_time() - started) / steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / 1024, "base": base}


def main() -> None:
    """Measure the kinds in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help="measure this one here, and print JSON")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.steps, options.dora)))
        return
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind, results in found.items():
            words = [sys.executable, __file__, "--kind", kind, "--steps", str(options.steps)]
            words += ["--dora"] * options.dora
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    for kind, results in found.items():
        keys = "seconds", "mib", "base"
        seconds, mib, base = (statistics.median(r[key] for r in results) for key in keys)
        text = f"{kind:6} {seconds:6.2f} s of the processor a step, {mib:7,.0f} MiB"
        print(f"{text}, base {base:.2f} of bfloat16")


if __name__ == "__main__":
    main()
