"""Tokens per second of `torchtitan generate` and of transformers, in turns on this machine.

    python scripts/bench_generate.py [--batch 1 4 8] [--tokens 64] [--rounds 5] [--dtype float32]

Both continue the same prompts of SmolLM2-135M (scripts/make_smollm2.py) greedily, without end
tokens, on one thread. A figure is the tokens of a batch over the processor time that it took, the
reading of the prompts included; processor time, since other programs may want the cores. Medians
are printed, and the median of the ratios within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torchtitan.distributed.context import open_context
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.generation.generate import Generator, Limits, Prompt
from torchtitan.generation.sampling import SamplingParams
from torchtitan.training.pretrained import describe_pretrained, load_pretrained
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.utils.environment import ProcessEnvironment

FOLDER = Path(__file__).parents[1] / ".cache" / "smollm2"
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):",
    "The three laws of motion are as follows: first,",
    "Water boils at",
    "In 1969, humans first",
    "My favourite recipe for pancakes starts with flour, eggs and",
    "List of prime numbers: 2, 3, 5,",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = describe_pretrained(str(FOLDER))
    ids = [found.tokenizer.encode(text, False, False) for text in TEXTS]
    ours = our_generate(found, options)
    theirs = their_generate(options)
    print("| batch | transformers | torchtitan | ratio: median (from - to) |")
    print("|---|---|---|---|")
    for size in options.batch:
        batch = (ids * size)[:size]
        for generate in (ours, theirs):
            generate(batch)
        pairs = [(seconds(ours, batch), seconds(theirs, batch)) for _ in range(options.rounds)]
        total = size * options.tokens
        rates = [statistics.median(total / pair[n] for pair in pairs) for n in (1, 0)]
        ratios = [their / our for our, their in pairs]
        middle = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        print(f"| {size} | {rates[0]:.1f} | {rates[1]:.1f} | {middle} |", flush=True)


def seconds(generate: Callable[[list[list[int]]], None], batch: list[list[int]]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    generate(batch)
    return time.process_time() - start


def our_generate(found: object, options: argparse.Namespace) -> Callable[..., None]:
    dims = ParallelDims()
    context = open_context("cpu", ProcessEnvironment(), 100)
    world = context.__enter__()
    model = load_pretrained(found, world, dims.build_mesh("cpu"), dims, torch_dtype(options.dtype))
    generator = Generator(model, found.tokenizer.decode, 8192, world.device)

    def generate(batch: list[list[int]]) -> None:
        prompts = [Prompt(number, ids) for number, ids in enumerate(batch)]
        for completion in generator.generate(prompts, Limits(options.tokens), SamplingParams()):
            assert len(completion.ids) == options.tokens

    generate.context = context  # lives as long as it is used
    return generate


def their_generate(options: argparse.Namespace) -> Callable[..., None]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch_dtype(options.dtype))
    model.generation_config.eos_token_id = None

    def generate(batch: list[list[int]]) -> None:
        longest = max(map(len, batch))
        tokens = model.generate(
            input_ids=torch.tensor([[0] * (longest - len(ids)) + ids for ids in batch]),
            attention_mask=torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch]
            ),
            max_new_tokens=options.tokens,
            do_sample=False,
            pad_token_id=0,
        )
        assert tokens.size(1) == longest + options.tokens

    return generate


if __name__ == "__main__":
    main()
