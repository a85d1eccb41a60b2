"""A tiny Llama trained for a few steps on some mesh, for comparison with one process.

Everything is float64, so that what is left of a difference is a mistake. The targets are spread
unevenly over the sequences: a mean per rank, instead of one over all, would show.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from torchtitan import builder
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import JobConfig
from torchtitan.config.facts import Facts
from torchtitan.distributed.grad_clip import clip_gradients, gradient_norm
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.world import World
from torchtitan.models.batch import IGNORE_INDEX, Batch

VOCAB_SIZE = 131
SEQ_LEN = 24
NUM_SEQUENCES = 8
NUM_STEPS = 3
MAX_NORM = 0.3
"""Below the norms that occur, so that clipping always acts."""


@dataclass(frozen=True)
class Case:
    """How to train."""

    world_size: int = 1
    replicate: int = 1
    shard: int = -1
    microbatches: int = 1
    tied: bool = False
    document_mask: bool = False
    loss_chunks: int = 3
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further sections of the config."""

    def config(self) -> JobConfig:
        float64 = dict.fromkeys(
            ("dtype", "mixed_precision_param", "mixed_precision_reduce"), "float64"
        )
        sections: dict[str, dict[str, Any]] = {
            "model": {
                "args": {
                    "n_layers": 2,
                    "dim": 32,
                    "n_heads": 4,
                    "n_kv_heads": 2,
                    "tied_embeddings": self.tied,
                }
            },
            "training": {
                **float64,
                "seq_len": SEQ_LEN,
                "global_batch_size": NUM_SEQUENCES,
                "document_mask": self.document_mask,
                "loss_chunks": self.loss_chunks,
            },
            "parallelism": {
                "data_parallel_replicate_degree": self.replicate,
                "data_parallel_shard_degree": self.shard,
            },
            "activation_checkpoint": {"mode": "none"},
            "optimizer": {"lr": 1e-2},
        }
        for name, values in self.settings.items():
            sections[name] = {**sections.get(name, {}), **values}
        return JobConfig.model_validate(sections)


@dataclass
class Result:
    """What has to be equal."""

    losses: list[float]
    norms: list[float]
    evaluated: float
    parameters: dict[str, torch.Tensor]


def sequences() -> Batch:
    """The data of every step: packed documents, targets spread unevenly."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (NUM_SEQUENCES, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(NUM_SEQUENCES):
        labels[row, : 2 * row] = IGNORE_INDEX
    starts = torch.rand(NUM_SEQUENCES, SEQ_LEN, generator=generator) < 0.2
    return Batch(
        tokens=tokens[:, :-1],
        labels=labels,
        positions=torch.arange(SEQ_LEN).repeat(NUM_SEQUENCES, 1),
        document_ids=starts.cumsum(1),
    )


def microbatches_of(case: Case, dims: ParallelDims, rank: int) -> list[Batch]:
    """This rank's share of the sequences, in microbatches."""
    size = NUM_SEQUENCES // dims.dp
    start = dims.dp_rank(rank) * size
    mine = {name: tensor[start : start + size] for name, tensor in sequences().items()}
    parts = {name: tensor.chunk(case.microbatches) for name, tensor in mine.items()}
    return [
        Batch({name: chunks[index] for name, chunks in parts.items()})
        for index in range(case.microbatches)
    ]


def train(world: World, case: Case) -> Result:
    """Train on the mesh of `case`; collective."""
    config = case.config()
    facts = Facts(config, world.world_size, "cpu")
    dims = ParallelDims.from_facts(facts)
    mesh = dims.build_mesh("cpu")
    model = builder.build_model(config, VOCAB_SIZE, mesh, dims, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    batches = microbatches_of(case, dims, world.rank)
    num_targets = int(CrossEntropyLoss().count(sequences()))
    result = Result([], [], 0.0, {})
    for _ in range(NUM_STEPS):
        loss = runner.forward_backward(batches, num_targets)
        norm = gradient_norm(model.parameters, dims.ranks_per_stage)
        clip_gradients(model.parameters, norm, MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        result.losses.append(loss.item())
        result.norms.append(norm.item())
    result.evaluated = runner.evaluate(batches).item() / num_targets
    for name, parameter in model.parts[0].named_parameters():
        result.parameters[name] = parameter.detach().full_tensor()  # type: ignore[attr-defined]
    return result
