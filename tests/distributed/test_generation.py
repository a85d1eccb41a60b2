"""Generation on meshes: the tokens of one process, and those of transformers on a real model."""

import functools
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scripts.bench_generate import TEXTS
from tests.pool import GlooPool
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.generation.generate import Generator, Limits, Prompt
from torchtitan.generation.sampling import SamplingParams
from torchtitan.models.decoder.args import DecoderArgs, build_decoder
from torchtitan.parallel.initialize import initialize_parameters
from torchtitan.parallel.parallelize import parallelize_for_inference
from torchtitan.utils.dtypes import default_dtype

IDS = [[5, 3, 9, 60, 2, 7, 8], [11], [4, 4, 100], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [70, 71]]
SIZES: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 131}


def build_tiny(dims: ParallelDims, changes: dict[str, Any]) -> nn.Module:
    with default_dtype(torch.float64), torch.device("meta"):
        model = build_decoder(DecoderArgs(**SIZES | changes))
    model.requires_grad_(False)
    parallelize_for_inference(model, dims.build_mesh("cpu"), dims, torch.float64)
    model.to_empty(device="cpu")
    initialize_parameters(model, model.init_rule, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def answer(
    world: DistributedContext, dims: ParallelDims, changes: dict[str, Any], temperature: float
) -> list[tuple[int, list[int]]]:
    def any_rank(value: bool) -> bool:
        return any(world.gather_json(value))

    shares = dims.dp_shard > 1
    model = build_tiny(dims, changes)
    found = Generator(model, str, 1000, world.device, any_rank if shares else bool)
    params = SamplingParams(temperature, top_p=0.9, repetition_penalty=1.1, seed=1)
    prompts = [Prompt(number, ids) for number, ids in enumerate(IDS)]
    mine = prompts[dims.dp_rank(world.rank) :: dims.dp]
    first = found.generate(mine, Limits(9, frozenset({13})), params)
    alone = prompts[:1] if dims.dp_rank(world.rank) == 0 else []  # others have nothing to do
    second = found.generate(alone, Limits(5), params)
    third = found.generate(  # a conversation that goes on
        [Prompt(7, [*IDS[0], *second[0].ids, 44, 45])] if second else [], Limits(5), params
    )
    return [(each.number, each.ids) for each in [*first, *second, *third]]


@pytest.mark.parametrize(
    ("dims", "changes"),
    [
        (ParallelDims(tp=2), {"n_kv_heads": 2}),
        (ParallelDims(tp=2), {"n_kv_heads": 1, "tied_embeddings": True, "sliding_window": 4}),
        (ParallelDims(tp=4), {"n_kv_heads": 2, "qk_norm": True}),
        (ParallelDims(dp_shard=2), {"n_kv_heads": 2, "tied_embeddings": True}),
        (ParallelDims(dp_shard=2, tp=2), {"tied_embeddings": True}),
        (ParallelDims(dp_replicate=2, tp=2), {}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mesh_gives_the_tokens_of_one_process(
    gloo_pool: GlooPool, dims: ParallelDims, changes: dict[str, Any], temperature: float
) -> None:
    (expected,) = gloo_pool.run(1, answer, ParallelDims(), changes, temperature)
    ranks = gloo_pool.run(dims.world_size, answer, dims, changes, temperature)
    assert len({tuple(ids) for _, ids in expected}) > 3
    assert sorted(chain(*ranks[:: dims.tp])) == sorted(expected)
    for rank, found in enumerate(ranks):  # those of a tensor-parallel group agree
        assert found == ranks[rank - rank % dims.tp]


def generate_smollm2(
    world: DistributedContext, folder: str, dims: ParallelDims, count: int
) -> list[tuple[int, list[int]]]:
    from torchtitan.training.pretrained import describe_pretrained, load_pretrained

    found = describe_pretrained(folder)
    model = load_pretrained(found, world, dims.build_mesh("cpu"), dims, torch.float32)

    def any_rank(value: bool) -> bool:
        return any(world.gather_json(value))

    generator = Generator(
        model,
        found.tokenizer.decode,
        found.args.max_seq_len,
        world.device,
        any_rank if dims.dp_shard > 1 else bool,
    )
    prompts = [
        Prompt(number, found.tokenizer.encode(text, False, False))
        for number, text in enumerate(TEXTS)
    ][dims.dp_rank(world.rank) :: dims.dp]
    # Without end tokens: all texts are of full length.
    completions = generator.generate(prompts, Limits(count), SamplingParams())
    return [(each.number, each.ids) for each in completions]


@functools.cache
def of_transformers(smollm2: Path, count: int) -> list[list[int]]:
    """Tokens that transformers takes greedily for each of TEXTS, past end tokens."""
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(str(smollm2))
    ids = [tokenizer.encode(text, False, False) for text in TEXTS]
    longest = max(map(len, ids))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = model.generate(
        input_ids=torch.tensor([[0] * (longest - len(each)) + each for each in ids]),
        attention_mask=torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in ids]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[:, longest:].tolist()


@pytest.mark.timeout(1200)  # FSDP gathers all weights for each token
@pytest.mark.parametrize(
    ("dims", "count"),
    [
        (ParallelDims(), 40),
        (ParallelDims(tp=3), 12),
        pytest.param(ParallelDims(), 128, marks=pytest.mark.nightly),
        pytest.param(ParallelDims(tp=3), 128, marks=pytest.mark.nightly),
        pytest.param(ParallelDims(dp_shard=2), 128, marks=pytest.mark.nightly),
    ],
)
def test_greedy_tokens_are_transformers(
    gloo_pool: GlooPool,
    smollm2: Path,
    dims: ParallelDims,
    count: int,
) -> None:
    ranks = gloo_pool.run(
        dims.world_size, generate_smollm2, str(smollm2), dims, count, timeout=1000
    )
    found = dict(chain(*ranks[:: dims.tp]))
    expected = of_transformers(smollm2, max(count, 40))
    assert [found[number] for number in range(len(TEXTS))] == [ids[:count] for ids in expected]
