"""One training step as any rank of any number of processes, in this process alone.

What fails at scale mostly fails at once: a shape that a degree does not divide, an operator that
does not know a sharded tensor, a stage without its layers. None of that needs a cluster to be seen.
Here the model is built, and a step run, by the functions that `train` uses, on *fake* tensors: they
have shapes and types and no content, so that a rank of a 405B model fits into a laptop. The process
group is fake too: it has the ranks of the real one, and its collectives return at once.

What a rehearsal cannot see is what depends on values or on other ranks: the data, the loss, speed,
a deadlock, and the memory that activations take.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan import builder
from torchtitan.builder import BuiltModel
from torchtitan.components.optimizer import build_optimizers, step_optimizers
from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.facts import Facts
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.grad_clip import clip_gradients, gradient_norm
from torchtitan.distributed.parallel_dims import AXES, ParallelDims
from torchtitan.distributed.world import fake_world
from torchtitan.models.batch import Batch
from torchtitan.models.registry import get_family
from torchtitan.utils.device import GIB, memory_peak

STAND_IN_VOCAB_SIZE = 128256
"""Where neither a tokenizer nor the model's flavor gives one."""
_KINDS_OF_MICROBATCH = 2
"""One that only accumulates gradients, and the last one, which reduces them."""
_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Rehearsal:
    """What this rank of the real run holds, and the time that it took to find out."""

    rank: int
    place: dict[str, tuple[int, int]]
    """Coordinate and degree by axis of the mesh."""
    modules: list[list[str]]
    """The top-level modules that each of the rank's model parts holds."""
    total_parameters: int
    """Of the whole model."""
    num_parameters: int
    """Elements that this rank holds, as are the bytes below."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    notes: list[str]
    """Where it differs from the real run."""
    seconds: float
    peak_gib: float
    """Resident memory of this process, the highest so far."""

    def report(self, facts: Facts) -> str:
        """All of it, and the batch, for reading."""
        training, rank = facts.config.training, self.rank
        place = "; ".join(f"{axis} {at} of {size}" for axis, (at, size) in self.place.items())
        lines = [
            ("rehearsal", f"rank {rank} of {facts.world_size}: one step runs, on fake tensors"),
            ("model", f"{facts.config.model.name} {facts.config.model.flavor}"),
            ("place", place),
        ]
        lines += [("holds", _listed(modules)) for modules in self.modules]
        share = self.num_parameters / self.total_parameters
        lines += [
            ("parameters", f"{self.num_parameters:,} of {self.total_parameters:,} ({share:.3%})"),
            ("memory", self._memory()),
            (
                "step",
                f"{facts.accumulation_steps} x {training.local_batch_size} sequences of"
                f" {training.seq_len} tokens a rank; {facts.global_batch_size} in all",
            ),
        ]
        lines += [("note", note) for note in self.notes]
        lines.append(("took", f"{self.seconds:.1f} s, {self.peak_gib:.2f} GiB of this machine"))
        return "\n".join(f"{name:<12}{text}" for name, text in lines)

    def _memory(self) -> str:
        sizes = {
            "parameters": self.parameter_bytes,
            "gradients": self.gradient_bytes,
            "optimizer state": self.optimizer_bytes,
        }
        parts = " + ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
        return f"{parts} = {sum(sizes.values()) / GIB:.2f} GiB, and activations"


def rehearse(facts: Facts, rank: int) -> Rehearsal:
    """Build and run one step of the checked config as `rank` of `facts.world_size` processes.

    Raises whatever would be raised in the real run.
    """
    start = time.perf_counter()
    vocab_size, notes = _vocab_size(facts.config)
    config, more_notes = _without_code_generation(facts.config)
    facts = replace(facts, config=config)
    dims = ParallelDims.from_facts(facts)
    with fake_world(rank, facts.world_size):
        mesh = dims.build_mesh(_DEVICE.type)
        # Cut on `meta`: there, 4096 parts of a parameter are 4096 views and no fake tensors.
        model = builder.build_model(
            config, vocab_size, mesh, dims, torch.device("meta"), initialise=False
        )
        with FakeTensorMode(allow_non_fake_inputs=True):
            for part in model.parts:
                part.to_empty(device=_DEVICE)
            parameter_bytes = _bytes(model.parameters)
            optimizers = build_optimizers(
                config.optimizer, model.parts, _DEVICE, model.parameter_names
            )
            gradient_bytes = _step(facts, model, optimizers, mesh, dims)
        return Rehearsal(
            rank=rank,
            place=_place(mesh),
            modules=[_modules(part) for part in model.parts],
            total_parameters=model.num_parameters,
            num_parameters=sum(_local(parameter).numel() for parameter in model.parameters),
            parameter_bytes=parameter_bytes,
            gradient_bytes=gradient_bytes,
            optimizer_bytes=_bytes(
                value
                for optimizer in optimizers
                for state in optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ),
            notes=notes + more_notes,
            seconds=time.perf_counter() - start,
            peak_gib=memory_peak(_DEVICE).reserved_gib,
        )


def _step(
    facts: Facts,
    model: BuiltModel,
    optimizers: list[torch.optim.Optimizer],
    mesh: DeviceMesh,
    dims: ParallelDims,
) -> int:
    """What `train` does in a step. Returns the bytes of this rank's gradients."""
    config = facts.config
    builder.call_after_load(model)
    runner = builder.build_runner(config, model, mesh, dims, _DEVICE)
    num_targets = facts.global_batch_size * config.training.seq_len
    loss = runner.forward_backward(_microbatches(facts), num_targets)
    norm = gradient_norm(model.parameters, dims.ranks_per_stage)
    clip_gradients(model.parameters, norm, config.training.max_norm)
    for handler in model.handlers:
        handler.pre_optimizer_hook(model.part_or_parts)
    gradient_bytes = _bytes(p.grad for p in model.parameters if p.grad is not None)
    step_optimizers(optimizers, torch.isfinite(norm) & torch.isfinite(loss))
    for handler in model.handlers:
        handler.post_optimizer_hook(model.part_or_parts)
    return gradient_bytes


def _vocab_size(config: JobConfig) -> tuple[int, list[str]]:
    """The tokenizer's, else the flavor's, else a stand-in, with a note about the latter."""
    try:
        return build_tokenizer(config.model.tokenizer_path).vocab_size, []
    except ConfigError:  # its files are not here
        family = get_family(config.model.name)
        args = family.resolve_args(config.model.flavor, config.model.args)
        if args.vocab_size is not None:
            return args.vocab_size, []
    note = f"no tokenizer: a vocabulary of {STAND_IN_VOCAB_SIZE} stands in for its own"
    return STAND_IN_VOCAB_SIZE, [note]


def _without_code_generation(config: JobConfig) -> tuple[JobConfig, list[str]]:
    """Blocks are traced, forward and backward, as for the real run; but there is no code for fake
    tensors, and none for GPUs without one."""
    if "compile" not in config.model.handlers:
        return config, []
    settings = {**config.handlers.get("compile", {}), "backend": "aot_eager"}
    handlers = {**config.handlers, "compile": settings}
    note = "compile: blocks are traced (aot_eager); no code is generated"
    return config.model_copy(update={"handlers": handlers}), [note]


def _microbatches(facts: Facts) -> list[Batch]:
    """One document a sequence, every position a target."""
    training = facts.config.training
    shape = (training.local_batch_size, training.seq_len)
    names = ("tokens", "labels", "positions", "document_ids")
    return [
        Batch({name: torch.zeros(shape, dtype=torch.int64) for name in names})
        for _ in range(min(_KINDS_OF_MICROBATCH, facts.accumulation_steps))
    ]


def _place(mesh: DeviceMesh) -> dict[str, tuple[int, int]]:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return {axis: (at, mesh.size(n)) for n, (axis, at) in enumerate(zip(AXES, coordinate))}


def _modules(part: nn.Module) -> list[str]:
    """Top-level modules of the part, a list's or dictionary's members each, in order."""
    names = [name.split(".") for name, _ in part.named_parameters()]
    return list(dict.fromkeys(".".join(n[: 1 + (len(n) > 1 and n[1].isdigit())]) for n in names))


def _listed(modules: list[str]) -> str:
    """In words; of more than four only the ends."""
    if len(modules) <= 4:
        return ", ".join(modules)
    return f"{modules[0]}, {modules[1]}, ..., {modules[-2]}, {modules[-1]}"


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the parts that this rank holds."""
    return sum(local.numel() * local.itemsize for local in map(_local, tensors))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
