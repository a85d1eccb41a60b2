"""Recording of one training step: every tensor that ranks can be compared by, with its place.

In the order of a step these are the batch, the parameters, what each module returns, the loss, the
gradients of what each module takes, the parameters' gradients, their norm, and the parameters after
the step. A rank writes what it holds; `step_compare` puts the ranks of a mesh together.

An activation's place is that of its tokens, which is known whatever ranks, microbatches and chunks
of the sequence they are in. A parameter's place is the indices of its elements.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from torchtitan.distributed.parallel_dims import AXES, ParallelDims
from torchtitan.models.attention import InnerAttention
from torchtitan.models.batch import Batch
from torchtitan.optim.update import Update
from torchtitan.parallel.context.context_parallel import ContextParallelAttention, UlyssesAttention
from torchtitan.parallel.initialize import local_indices
from torchtitan.parallel.random_streams import TOKEN_INDEX, RandomStreams
from torchtitan.parallel.runner import Runner
from torchtitan.training.model_builder import BuiltModel
from torchtitan.training.module_watch import WHOLE_MODEL, Direction, ModuleUse, ModuleWatch
from torchtitan.utils.torch_compat import local_tensor

PHASES = (
    "batch",
    "parameters",
    "forward",
    "loss",
    "backward",
    "gradients",
    "gradient norm",
    "updated parameters",
)
"""The tensors of a step, in the order in which they exist."""
TOKEN_BITS = 32
"""A place is the number of the sequence within the step, and in so many bits that of the token."""
_HEADS_FIRST = (InnerAttention, ContextParallelAttention, UlyssesAttention)
_BYTES_IN_MEMORY = 256 << 20
"""Bytes to keep before a file of them is written."""


class TensorRecorder:
    """Writes one rank's tensors to a folder."""

    def __init__(self, folder: str | Path, name: str, dims: ParallelDims):
        """Record to files of this name in `folder`, which is made."""
        self._rank, self.dims = dist.get_rank(), dims
        self._path = Path(folder) / f"{name}-{self._rank}"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.coordinate = _coordinate(self._rank, dims)
        self._entries: list[dict[str, Any]] = []
        self._tensors: dict[str, Tensor] = {}
        self._num_files = self._num_bytes = 0
        self._left_out: Counter[str] = Counter()

    def add(
        self,
        phase: str,
        name: str,
        value: Tensor,
        places: Sequence[Tensor] = (),
        stage: int = 0,
        shares: int = 1,
    ) -> None:
        """Record a value.

        `places`: of an activation `[B, T, F]`, those of its tokens, `[B, T]`; of any other tensor,
        the indices along each dimension. `shares`: the ranks that may have parts of the features.
        """
        value = value.detach().cpu().contiguous().clone()
        key = str(len(self._entries))
        self._tensors[key] = value
        for number, place in enumerate(places):
            self._tensors[f"{key}/{number}"] = place.cpu().contiguous().clone()  # files share none
        entry = {"phase": phase, "name": name, "key": key, "stage": stage, "shares": shares}
        entry |= {"places": len(places), "file": self._next_file.name}
        self._entries.append(entry)
        self._num_bytes += value.nbytes
        if self._num_bytes > _BYTES_IN_MEMORY:
            self._write_tensors()

    def add_held(self, phase: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Record what this rank holds of tensors that are plain or sharded."""
        for name, tensor in tensors:
            local = local_tensor(tensor.detach())
            if type(local) in (Tensor, nn.Parameter):  # not quantised ones, which do not change
                self.add(phase, name, local, local_indices(tensor))

    def add_batch(self, batch: Batch, places: Tensor) -> None:
        """Record the tensors of a batch that hold a number for each of this rank's tokens."""
        names = {"token_document_ids": "document_ids"}  # of context parallelism
        hidden = {TOKEN_INDEX} | {other for name, other in names.items() if name in batch}
        for name, tensor in batch.items():
            if tensor.shape == places.shape and name not in hidden:
                self.add("batch", names.get(name, name), tensor.unsqueeze(-1), [places])

    def add_activation(
        self, direction: Direction, use: ModuleUse, number: int, value: Tensor, stage: int
    ) -> None:
        """Record an output, or the gradient of an input, if it has a value for each token."""
        if not use.module.training or use.places is None:
            return  # of a frozen model's pass
        if use.name == WHOLE_MODEL:  # another one in each pipeline stage
            return
        name = use.name if number == 1 else f"{use.name} #{number}"
        name = name if use.number == 1 else f"{name} (use {use.number})"
        if value.dim() == 4 and isinstance(use.module, _HEADS_FIRST):
            value = value.transpose(1, 2)
        sequences, tokens = use.places.shape
        tp = self.dims.tp
        if (
            value.dim() < 2
            or len(value) != sequences
            or value.size(1) not in (tokens, tokens // tp)
        ):
            self._left_out[name] += 1
            return
        places, shares = use.places, tp
        if value.size(1) != tokens:  # sequence parallelism
            places, shares = places.chunk(tp, 1)[self.coordinate["tp"]], 1
        self.add(direction, name, value.reshape(*value.shape[:2], -1), [places], stage, shares)

    def write(self) -> None:
        """Write what there is, and the list of everything so far."""
        self._write_tensors()
        about = {"rank": self._rank, "degrees": asdict(self.dims), "place": self.coordinate}
        about |= {"left_out": dict(self._left_out), "entries": self._entries}
        self._path.with_suffix(".json").write_text(json.dumps(about))

    @property
    def _next_file(self) -> Path:
        return self._path.with_name(f"{self._path.name}-{self._num_files}.safetensors")

    def _write_tensors(self) -> None:
        if self._tensors:
            save_file(self._tensors, self._next_file)
        self._tensors, self._num_bytes = {}, 0
        self._num_files += 1


def record_backward(
    recorder: TensorRecorder,
    model: BuiltModel,
    runner: Runner,
    step: int,
    runs_compiled: bool = True,
) -> None:
    """Let `runner` record its forward and backward of `step`.

    With an optimizer in the backward there are no gradients of parameters to record.
    """
    plan, places = model.plan, _Places(runner.streams)
    stages = [0] if plan is None else plan.held_by(recorder.coordinate["pp"])

    def report(direction: Direction, use: ModuleUse, number: int, value: Tensor) -> None:
        stage = stages[use.part]
        # A module of another stage may be there for a weight that both share.
        if plan is None or plan.module_of(use.name) in plan.stages[stage]:
            recorder.add_activation(direction, use, number, value, stage)

    original = runner.forward_backward

    def forward_backward(microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        if runner.streams.step != step:
            return original(microbatches, num_targets)
        runner.forward_backward = original  # type: ignore[method-assign]  # once
        recorder.add_held("parameters", _named(model))
        watch = ModuleWatch(runner.streams, report, lambda: places.current)
        with watch.modules(model.parts, runs_compiled), places, _batches_shown(runner, recorder):
            loss = original(places.numbered(microbatches), num_targets)
        recorder.add("loss", "loss", loss)
        gradients = [(name, p.grad) for name, p in _named(model) if p.grad is not None]
        recorder.add_held("gradients", reversed(gradients))
        recorder.write()
        return loss

    runner.forward_backward = forward_backward  # type: ignore[method-assign]


def record_update(recorder: TensorRecorder, model: BuiltModel, update: Update, steps: int) -> None:
    """Let `update` record the last one of the next `steps` steps."""
    gradient_norm, step_parameters, left = update.gradient_norm, update.step, steps

    def norm_of_step() -> Tensor:
        nonlocal left
        norm, left = gradient_norm(), left - 1
        if left == 0:
            recorder.add("gradient norm", "gradient norm", norm)
            recorder.write()  # a step that is not finite ends the run
        return norm

    def step(is_finite: Tensor) -> None:
        step_parameters(is_finite)
        if left == 0:
            recorder.add_held("updated parameters", _named(model))
            recorder.write()

    update.gradient_norm, update.step = norm_of_step, step  # type: ignore[method-assign]


def _coordinate(rank: int, dims: ParallelDims) -> dict[str, int]:
    """Return a rank's place on each axis of the mesh, whose last axis varies fastest."""
    place = {}
    for axis in reversed(AXES):
        rank, place[axis] = divmod(rank, getattr(dims, axis))
    return place


def _named(model: BuiltModel) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of this rank with their names; two stages may each have a copy."""
    return [named for part in model.parts for named in part.named_parameters()]


class _Places:
    """The places of the tokens of the microbatch at hand: number of the sequence, and of the token.

    They travel within the batch, in the upper half of what random streams know of a token, so they
    hold whatever a runner does with the batches.
    """

    def __init__(self, streams: RandomStreams):
        self._streams = streams
        self.current: Tensor | None = None
        """`[B, T]`; see `TOKEN_BITS`."""

    def numbered(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """Return the microbatches of this rank's step with their tokens' places."""
        numbered, row = [], 0
        for batch in microbatches:
            tokens = batch["tokens"]
            rows = range(row, row := row + len(tokens))
            numbers = torch.tensor([[self._streams.sequence_number(n)] for n in rows])
            places = (numbers << TOKEN_BITS) + torch.arange(tokens.size(1))
            numbered.append(Batch({**batch, TOKEN_INDEX: places}))
        return numbered

    def __enter__(self) -> None:
        begin = self._streams.begin_microbatch

        def begin_numbered(index: int, token_index: Tensor | None = None) -> None:
            assert token_index is not None, "every batch was given the places of its tokens"
            self.current = token_index
            begin(index, token_index & ((1 << TOKEN_BITS) - 1))

        self._streams.begin_microbatch = begin_numbered  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self._streams.begin_microbatch


@contextmanager
def _batches_shown(runner: Runner, recorder: TensorRecorder) -> Iterator[None]:
    """Record each batch as the loss gets it: the model has taken its inputs from the same one."""
    loss: Any = runner.loss
    original: Callable[[Tensor, nn.Module, Batch], Tensor] = loss.sum

    def shown(hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        recorder.add_batch(batch, batch[TOKEN_INDEX])
        return original(hidden, head, batch)

    loss.sum = shown
    try:
        yield
    finally:
        del loss.sum
