"""A tiny model trained for a few steps on some mesh, for comparison with one process.

Everything is float64, so that what is left of a difference is a mistake. Little divides anything:
the vocabulary is a prime, and targets are spread unevenly, so that a mean per rank, instead of one
over all, would show; some sequences have none at all.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tests.distributed import own_models
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers import lora
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.models.registry import MODELS
from torchtitan.models.spec import InitRule
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.parallel.grad_clip import clip_gradients
from torchtitan.parallel.initialize import local_indices
from torchtitan.training import builder, model_builder
from torchtitan.training.frozen_model import with_frozen_model
from torchtitan.training.reference_pass import PairSet
from torchtitan.training.tensor_recorder import TensorRecorder, record_backward, record_update

VOCAB_SIZE = 131
SEQ_LEN = 32
NUM_SEQUENCES = 8
NUM_STEPS = 3
MAX_NORM = 0.3
"""Below the norms of most rows, so that clipping acts; those of adapters are smaller."""
LORA_B = InitRule("normal", std=0.1)
"""The start of adapters: at zero, as in a run, only one of the two factors has a gradient."""

REFERENCE_SEED = 5
"""Seeds the model that preference losses compare with; the start differs from it, too."""


@dataclass(frozen=True)
class Case:
    """How to train: the mesh, what is special, and the model (which must be the reference's)."""

    world_size: int = 1
    replicate: int = 1
    shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    microbatches: int = 1
    """Batches of a rank and step, whose gradients accumulate."""
    family: str = "llama3"
    """One of the registry, or of `own_models`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters in addition to those of the fields below."""
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    tied: bool = False
    norm: str = "rmsnorm"
    document_mask: bool = False
    padded: bool = False
    """Each document is a sequence of its own, without a mask; the reference has them packed."""
    window: int | None = None
    loss_chunks: int = 3
    schedule: str = "1F1B"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further sections of the config."""

    def config(self) -> JobConfig:
        if self.family not in MODELS:
            own_models.register()
        float64 = dict.fromkeys(
            ("dtype", "mixed_precision_param", "mixed_precision_reduce"), "float64"
        )
        args = {
            "dim": 32,
            "ffn_dim": 88,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads,
            "tied_embeddings": self.tied,
            "sliding_window": self.window,
            **self.args,
        }
        sections: dict[str, dict[str, Any]] = {
            "model": {"name": self.family, "args": args, "norm_type": self.norm},
            "training": {
                **float64,
                "dataset": "stdlib",
                "seq_len": SEQ_LEN,
                "global_batch_size": NUM_SEQUENCES,
                "local_batch_size": NUM_SEQUENCES // (self.dp * self.microbatches),
                "document_mask": self.document_mask and not self.padded,
                "loss_chunks": self.loss_chunks,
            },
            "parallelism": {
                "data_parallel_replicate_degree": self.replicate,
                "data_parallel_shard_degree": self.shard,
                "context_parallel_degree": self.cp,
                "tensor_parallel_degree": self.tp,
                "pipeline_parallel_degree": self.pp,
                "pipeline_parallel_schedule": self.schedule,
            },
            "activation_checkpoint": {"mode": "none"},
            "optimizer": {"lr": 1e-2},
        }
        if self.settings.get("loss", {}).get("name") == "dpo":
            sections["data"] = {"format": "preference"}
        for name, values in self.settings.items():
            sections[name] = {**sections.get(name, {}), **values}
        return JobConfig.model_validate(sections)

    @property
    def dp(self) -> int:
        """Ranks that read different data."""
        return self.world_size // (self.cp * self.tp * self.pp)


class Part(NamedTuple):
    """What a rank holds of a tensor: its elements, and for each dimension where they belong."""

    indices: tuple[np.ndarray, ...]
    values: np.ndarray


@dataclass
class Result:
    """What has to be equal."""

    losses: list[float] = field(default_factory=list)
    """Of the steps, each followed by its terms."""
    norms: list[float] = field(default_factory=list)
    evaluated: float = 0.0
    parameters: dict[str, Part] = field(default_factory=dict)
    moments: dict[str, Part] = field(default_factory=dict)


def sequences() -> Batch:
    """The data of every step: packed documents, targets spread unevenly."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (NUM_SEQUENCES, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(NUM_SEQUENCES):
        labels[row, : 6 * row] = IGNORE_INDEX
    # From a single document to many of few tokens.
    often = torch.linspace(0, 0.4, NUM_SEQUENCES).unsqueeze(1)
    starts = torch.rand(NUM_SEQUENCES, SEQ_LEN, generator=generator) < often
    return Batch(
        tokens=tokens[:, :-1],
        labels=labels,
        positions=torch.arange(SEQ_LEN).repeat(NUM_SEQUENCES, 1),
        document_ids=starts.cumsum(1),
    )


def pairs() -> Batch:
    """The data of every step of a preference loss: one to three pairs a row, and padding.

    A pair has its prompt twice, without targets, and each row ends with padding of another length.
    """
    generator = torch.Generator().manual_seed(1)
    batch = Batch({name: torch.zeros_like(tensor) for name, tensor in sequences().items()})
    batch["labels"].fill_(IGNORE_INDEX)
    for row in range(NUM_SEQUENCES):
        place = 0
        for pair in range(1 + row % 3):
            prompt = torch.randint(0, VOCAB_SIZE, (1 + (row + pair) % 2,), generator=generator)
            for side, length in enumerate((1 + (row + pair) % 3, 1 + row % 2)):
                answer = torch.randint(0, VOCAB_SIZE, (length,), generator=generator)
                text = torch.cat([prompt, answer])
                end = place + len(text)
                batch["tokens"][row, place:end] = text
                batch["labels"][row, place + len(prompt) - 1 : end - 1] = answer
                batch["document_ids"][row, place:end] = 2 * pair + side
                batch["positions"][row, place:end] = torch.arange(len(text))
                place = end
        assert place < SEQ_LEN
        batch["document_ids"][row, place:] = 2 * pair + 2
        batch["positions"][row, place:] = torch.arange(SEQ_LEN - place)
    return batch


def data_of(case: Case) -> Batch:
    """The data of every step."""
    return pairs() if case.config().loss.name == "dpo" else sequences()


def _one_a_row(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The documents of packed sequences, each at the start of a padded one."""
    found = []
    for row, ids in enumerate(packed["document_ids"]):
        for number in ids.unique():
            tokens, labels = (packed[name][row, ids == number] for name in ("tokens", "labels"))
            padding = (0, SEQ_LEN - len(tokens))
            found.append((F.pad(tokens, padding), F.pad(labels, padding, value=IGNORE_INDEX)))
    tokens, labels = (torch.stack(tensors) for tensors in zip(*found))
    positions = torch.arange(SEQ_LEN).repeat(len(found), 1)
    return {"tokens": tokens, "labels": labels, "positions": positions}


def microbatches_of(case: Case, dims: ParallelDims, rank: int) -> list[Batch]:
    """This rank's share of the sequences, in microbatches."""
    size = NUM_SEQUENCES // dims.dp
    start = dims.dp_rank(rank) * size
    mine = {name: tensor[start : start + size] for name, tensor in data_of(case).items()}
    mine = _one_a_row(mine) if case.padded else mine
    parts = {name: tensor.chunk(case.microbatches) for name, tensor in mine.items()}
    return [
        Batch({name: chunks[index] for name, chunks in parts.items()})
        for index in range(case.microbatches)
    ]


@functools.lru_cache
def mesh_of(world: DistributedContext, dims: ParallelDims) -> DeviceMesh:
    """One mesh for all cases of a world that the pool keeps."""
    return dims.build_mesh("cpu")


def train(world: DistributedContext, case: Case, folder: Path | None = None) -> Result:
    """Train on the mesh of `case`; collective. `folder`: only one step, recorded there."""
    torch._dynamo.reset()  # what an earlier case has compiled
    config = case.config()
    context = RunContext(config, world.world_size, "cpu")
    dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
    mesh = mesh_of(world, dims)
    with patch.object(lora, "B_RULE", LORA_B):
        model = model_builder.build_model(config, VOCAB_SIZE, mesh, dims, world.device)
    model_builder.initialize_added(model)
    batches = microbatches_of(case, dims, world.rank)
    with of_reference(config, world) as other:
        runner, _ = with_frozen_model(
            other,
            builder.build_runner(config, model, mesh, dims, world.device),
            model,
            VOCAB_SIZE,
            mesh,
            dims,
            world,
            sets=lambda: [PairSet("pairs", "of every step", lambda: [batches])],
        )
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    update = builder.build_update(config, model, optimizers, dims)
    if folder is not None:
        record_backward(TensorRecorder(folder, "backward", dims), model, runner, step=1)
        record_update(TensorRecorder(folder, "update", dims), model, update, steps=1)
    num_targets = int(runner.loss.count(data_of(case)))
    result = Result()
    for step in range(1, NUM_STEPS + 1 if folder is None else 2):
        runner.streams.step = step
        loss = runner.forward_backward(batches, num_targets)
        norm = update.gradient_norm()
        clip_gradients(model.parameters, norm, MAX_NORM)
        update.step(torch.isfinite(norm))
        for optimizer in optimizers:
            optimizer.zero_grad()
        result.losses += [loss.item(), *map(float, runner.terms.values())]
        result.norms.append(norm.item())
    result.evaluated = runner.evaluate(batches).item() / num_targets
    collect(model.parts, optimizers, result)
    return result


@contextmanager
def of_reference(config: JobConfig, world: DistributedContext) -> Iterator[JobConfig]:
    """Other initial weights; and a folder of one's own to keep log-probabilities in."""
    args = config.loss.args
    with TemporaryDirectory() as folder:
        if "reference_cache" in args:
            args = {**args, "reference_cache": world.broadcast_json(folder)}
        yield config.model_copy(
            update={
                "debug": config.debug.model_copy(update={"seed": REFERENCE_SEED}),
                "loss": config.loss.model_copy(update={"args": args}),
            }
        )


def collect(
    parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], result: Result
) -> None:
    """Add what this rank holds of the weights, and of what an optimizer keeps of each, to `result`.
    Not whole tensors: to gather them would take longer than the training."""
    states = {key: state for optimizer in optimizers for key, state in optimizer.state.items()}
    for part in parts:
        for name, parameter in part.named_parameters():
            if name in result.parameters:  # both copies of a tied weight are on this rank
                assert np.array_equal(result.parameters[name].values, _part_of(parameter).values)
            result.parameters[name] = _part_of(parameter)
            for kind, value in states.get(parameter, {}).items():
                if value.dim():  # not the count of steps
                    result.moments[f"{kind} of {name}"] = _part_of(value)


def _part_of(tensor: Tensor) -> Part:
    indices = tuple(index.numpy() for index in local_indices(tensor))
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return Part(indices, local.detach().double().numpy().copy())  # numpy knows no bfloat16


@dataclass(frozen=True)
class Difference:
    """The largest relative differences to the reference; for tensors, max|a - b| / max|b|."""

    losses: float
    norms: float
    evaluated: float
    parameters: float
    moments: float
    between_ranks: float
    """The largest difference of what several ranks hold, or report, alike."""

    @property
    def worst(self) -> float:
        """The largest of all; nan if one is."""
        return float(np.max(list(vars(self).values())))


def compare(results: Sequence[Result], reference: Result) -> Difference:
    """What all ranks of a mesh have, against one process.

    Together the ranks must hold every element of every tensor of the reference, and nothing else.
    """
    first, differs = results[0], [0.0]
    for result in results[1:]:
        for kind in ("losses", "norms", "evaluated"):
            differs.append(_relative(getattr(result, kind), getattr(first, kind)))
    parameters, among = _compare_parts([r.parameters for r in results], reference.parameters)
    moments, among_moments = _compare_parts([r.moments for r in results], reference.moments)
    return Difference(
        losses=_relative(first.losses, reference.losses),
        norms=_relative(first.norms, reference.norms),
        evaluated=_relative(first.evaluated, reference.evaluated),
        parameters=parameters,
        moments=moments,
        between_ranks=float(np.max([*differs, among, among_moments])),
    )


def _compare_parts(
    ranks: Sequence[dict[str, Part]], reference: dict[str, Part]
) -> tuple[float, float]:
    """The largest difference of any element to the reference, and between ranks."""
    assert set().union(*ranks) == reference.keys()
    to_reference, between = [0.0], [0.0]
    for name, (_, expected) in reference.items():
        scale = np.abs(expected).max()
        whole = np.full_like(expected, np.nan)
        covered = np.zeros(expected.shape, dtype=bool)
        for part in (held[name] for held in ranks if name in held):
            where = np.ix_(*part.indices)
            if not part.values.size:
                continue
            to_reference.append(np.abs(part.values - expected[where]).max() / scale)
            known = covered[where]
            if known.any():
                between.append(np.abs(part.values - whole[where])[known].max() / scale)
            whole[where] = part.values
            covered[where] = True
        assert covered.all(), f"no rank holds all of {name}"
    return float(np.max(to_reference)), float(np.max(between))


def _relative(values: Any, reference: Any) -> float:
    a, b = np.asarray(values), np.asarray(reference)
    return float(np.max(np.abs(a - b) / np.abs(b)))
