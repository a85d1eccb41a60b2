"""A checkpoint opened on the mesh that a command line asks for."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.api.start import read_or_refuse
from torchtitan.api.text import default_dtype, device_kind
from torchtitan.checkpoint.base_place import moved_base
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.paths import expand_path
from torchtitan.distributed.context import DistributedContext, open_context
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.generation.generate import Generator, Limits
from torchtitan.generation.sampling import SamplingParams
from torchtitan.training.pretrained import Pretrained, describe_pretrained, load_pretrained
from torchtitan.utils import environment as env
from torchtitan.utils.device import set_up_process
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.utils.logging import init_logging
from torchtitan.utils.processes import end_with_launcher

_TP_KEY, _FSDP_KEY = "--tensor-parallel-degree", "--data-parallel-shard-degree"


@dataclass(frozen=True)
class ModelSession:
    """A model that is ready to generate, and this rank's place."""

    world: DistributedContext
    dims: ParallelDims
    mesh: DeviceMesh
    model: nn.Module
    generator: Generator


def look_at(
    options: argparse.Namespace, problems: Sequence[ConfigIssue] = ()
) -> tuple[env.ProcessEnvironment, Pretrained]:
    """Return this process's place and the checkpoint, after the checks that need no weights.

    Raises ConfigError with `problems` and what is wrong with the output.
    """
    place = read_place()
    output = getattr(options, "output", None)
    if output not in (None, "-") and place.rank == 0:
        problems = [*problems, *_output_problems(Path(expand_path(output)))]
    if problems:
        raise ConfigError(problems)
    moved = moved_base(options.base)
    found = describe_pretrained(expand_path(options.checkpoint), options.tokenizer, moved)
    mesh_of(options, found, place.world_size)
    return place, found


def _output_problems(file: Path) -> Iterator[ConfigIssue]:
    if os.path.lexists(file):
        fix = "remove it, or choose another name"
        yield ConfigIssue("--output", "exists already", fix, str(file))
    elif not os.access(file.parent, os.W_OK | os.X_OK):
        problem = "its folder does not exist, or cannot be written to"
        yield ConfigIssue("--output", problem, "make the folder first", str(file))


def read_place() -> env.ProcessEnvironment:
    """Return this process's place among those of a launcher. Raises ConfigError."""
    read_or_refuse(env.adopt_place)
    return read_or_refuse(env.read_environment)


def mesh_of(options: argparse.Namespace, found: Pretrained, world_size: int) -> ParallelDims:
    """Return the mesh of the options. Raises ConfigError if the model or the ranks do not fit."""
    tp, shards = options.tensor_parallel_degree, options.data_parallel_shard_degree
    problems = []
    if tp > 1:
        problems = found.args.tensor_parallel_problems(tp)
        problems = [ConfigIssue(_TP_KEY, p.problem, p.fix, tp) for p in problems]
    if world_size % (tp * shards):
        key, degree = (_FSDP_KEY, shards) if shards > 1 else (_TP_KEY, tp)
        text = f"the ranks of the mesh, {tp * shards}, do not divide the {world_size} processes"
        fix = f"start {tp * shards} with torchrun, or set a smaller degree"
        problems.append(ConfigIssue(key, text, fix, degree))
    if problems:
        raise ConfigError(problems)
    return ParallelDims(dp_replicate=world_size // (tp * shards), dp_shard=shards, tp=tp)


def sampling_of(options: argparse.Namespace) -> SamplingParams:
    """Return the distribution of the options, unchecked."""
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


def limits_of(options: argparse.Namespace, found: Pretrained, *more: int | None) -> Limits:
    """Return the ends of a completion; `more` tokens end it, too."""
    ends = found.eos_ids | {token for token in more if token is not None}
    return Limits(options.max_new_tokens, frozenset(ends), tuple(filter(None, options.stop)))


@contextmanager
def open_session(
    options: argparse.Namespace,
    found: Pretrained,
    place: env.ProcessEnvironment,
    patience_seconds: int = 600,
) -> Iterator[ModelSession]:
    """Join the other ranks and load the model. All ranks enter.

    `patience_seconds`: how long a rank waits for another one, in the chat for the user.
    """
    dims = mesh_of(options, found, place.world_size)
    kind = device_kind(options.device, "--device")
    end_with_launcher()
    init_logging(place.rank)
    set_up_process(0, place, options.seed)
    if place.rank == 0:
        for notice in found.notices:
            print(f"notice: {notice}", file=sys.stderr)
    dtype = torch_dtype(options.dtype or default_dtype(kind))
    with open_context(kind, place, patience_seconds) as world:
        mesh = dims.build_mesh(world.device.type)
        model = load_pretrained(found, world, mesh, dims, dtype)

        def any_rank(value: bool) -> bool:
            if dims.dp_shard == 1:
                return value
            flag = torch.tensor(int(value))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=world.control_group)
            return bool(flag)

        generator = Generator(
            model, found.tokenizer.decode, found.args.max_seq_len, world.device, any_rank
        )
        yield ModelSession(world, dims, mesh, model, generator)
