"""The runner of a pipeline's stages.

One run of the schedule covers all microbatches of a step, those of gradient accumulation too: the
pipeline fills and drains once a step, and gradients are reduced over the data ranks once, after the
last backward of a stage. Only hidden states and their gradients travel between stages. All ranks
along the pipeline read the same data, so every stage has positions, documents and labels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from torchtitan.config.schema import Parallelism
from torchtitan.models.batch import Batch
from torchtitan.parallel.data_parallel import free_gathered, set_gradient_sync
from torchtitan.parallel.pipeline.schedules import forward_ticks
from torchtitan.parallel.pipeline.stages import PipelinePlan
from torchtitan.parallel.pipeline.tied_weights import TiedWeight, sum_tied_gradients
from torchtitan.parallel.random_streams import TOKEN_INDEX
from torchtitan.parallel.runner import (
    Loss,
    RunnerBase,
    add_over_ranks,
    frozen_pass_of,
    terms_of,
)
from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.torch_compat import (
    PipelineSchedule,
    before_stage_forward,
    build_pipeline_schedule,
)


class HiddenStates(NamedTuple):
    """The tensors between stages: `[B, T / tensor_parallel_degree, size]`."""

    size: int
    dtype: torch.dtype
    tensor_parallel_degree: int

    def empty(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Return uninitialised hidden states for `tokens` `[B, T]`."""
        shape = (tokens.size(0), tokens.size(1) // self.tensor_parallel_degree, self.size)
        return torch.empty(shape, dtype=self.dtype, device=device)


class LocalStages(NamedTuple):
    """The stages of this pipeline rank, and how they run."""

    parts: Sequence[nn.Module]
    """The stages that `plan` gives this rank of `group`, in order."""
    plan: PipelinePlan
    group: dist.ProcessGroup
    """The ranks along the pipeline."""
    hidden: HiddenStates
    section: Parallelism
    tied: Sequence[TiedWeight] = ()
    """This rank's copies of tied weights."""


class PipelineRunner(RunnerBase):
    """Runs this rank's stages; a `Runner`."""

    def __init__(self, local: LocalStages, *args: Any, **kwargs: Any):
        """See `RunnerBase`."""
        super().__init__(*args, **kwargs)
        self._plan, self._group, self._hidden = local.plan, local.group, local.hidden
        self._section, self._tied = local.section, local.tied
        self._rank = dist.get_rank(local.group)
        self._stages = dict(zip(local.plan.held_by(self._rank), local.parts, strict=True))
        self._last = len(local.plan.stages) - 1
        self._tokens, *self._other_inputs = self.input_names
        for part in local.parts:
            self.streams.attach(part)
        self._pieces: list[Batch] = []
        self._num_targets = 0
        self._connected = False
        self._schedules: dict[tuple[int, torch.Size], PipelineSchedule] = {}

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        """See `Runner`."""
        assert num_targets > 0, "a step without targets has no mean"
        self._connect()
        for part in self._stages.values():
            part.train()
        self._pieces, self._num_targets = self._split(microbatches), num_targets
        names = [self._tokens] * (0 in self._stages) + self._other_inputs
        inputs = {name: torch.cat([piece[name] for piece in self._pieces]) for name in names}
        tokens = [inputs.pop(self._tokens)] if 0 in self._stages else []
        losses: list[Tensor] = []
        # The schedule cuts what it is given into microbatches again; by the target, which is the
        # microbatch's number, the loss finds all the rest.
        target = torch.arange(len(self._pieces))
        self._schedule().step(*tokens, **inputs, target=target, losses=losses, return_outputs=False)
        sum_tied_gradients(self._tied, self._group, self.device)
        self.streams.end_microbatches()
        dtype = at_least_float32(self._hidden.dtype)
        total = sum(map(Tensor.detach, losses), torch.zeros((), dtype=dtype, device=self.device))
        terms = terms_of(self.loss) if self._last in self._stages else {}
        loss, self.terms = add_over_ranks(self.loss, total, terms, num_targets, self.is_loss_leader)
        return loss

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Batch], loss: Loss | None = None) -> Tensor:
        """See `Runner`. Takes any number of microbatches of any size."""
        self._connect()
        loss = loss or self.evaluation_loss
        for part in self._stages.values():
            part.eval()
        pieces = self._split(microbatches)
        stage_to_rank = self._plan.stage_to_rank
        hidden: dict[tuple[int, int], Tensor] = {}  # by the stage that needs it, and microbatch
        # Wide, as `SPMDRunner` has it: there may be any number of microbatches.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tick in forward_ticks(stage_to_rank, len(pieces)):
            transfers = []
            for rank, (stage, _, index) in tick.items():
                if rank == self._rank:
                    out = self._forward(stage, pieces[index], hidden.pop((stage, index), None))
                    if stage == self._last:
                        total += self._loss(loss, out, pieces[index])
                    elif stage_to_rank[stage + 1] == rank:
                        hidden[stage + 1, index] = out
                    else:
                        peer = stage_to_rank[stage + 1]
                        transfers.append(self._transfer(dist.isend, out.contiguous(), peer))
                elif stage < self._last and stage_to_rank[stage + 1] == self._rank:
                    hidden[stage + 1, index] = self._empty_hidden(pieces[index])
                    transfers.append(self._transfer(dist.irecv, hidden[stage + 1, index], rank))
            for work in dist.batch_isend_irecv(transfers) if transfers else []:
                work.wait()
        for part in self._stages.values():
            free_gathered(part)
        terms = terms_of(loss) if self._last in self._stages else {}
        total, self.evaluated_terms = add_over_ranks(loss, total, terms, 1, self.is_loss_leader)
        return total

    def dry_run(self, batch: Batch) -> None:
        """Run forward and backward of this rank's stages for one microbatch of `batch`.

        Stages exchange nothing and receive made-up hidden states, so this shows the memory and time
        they need. Gradients accumulate as in a step. The model is its own frozen model.
        """
        piece = self._split([batch])[0]
        for stage, part in self._stages.items():
            part.train()
            self.streams.begin_microbatch(0, piece.get(TOKEN_INDEX))
            set_gradient_sync(part, enabled=True)
            received = self._empty_hidden(piece).requires_grad_() if stage else None
            out = self._forward(stage, piece, received)
            if stage == self._last:
                if frozen_pass := frozen_pass_of(self.loss):
                    with torch.no_grad():
                        self._loss(frozen_pass, out, piece)
                    [piece] = frozen_pass.annotated([piece])
                self._loss(self.loss, out, piece).backward()
            else:
                out.backward(self._empty_hidden(piece))

    def _connect(self) -> None:
        """Run one collective of all ranks along the pipeline before the first transfer.

        NCCL connects ranks in a group's first exchange, in which all must take part.
        """
        if not self._connected:
            dist.all_reduce(torch.zeros((), device=self.device), group=self._group)
            self._connected = True

    def _split(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """Return the pipeline's microbatches on the device."""
        pieces = []
        for batch in microbatches:
            size = self._section.pipeline_parallel_microbatch_size
            parts = {name: x.split(size) for name, x in self._prepare(batch).items()}
            for index in range(len(parts[self._tokens])):
                pieces.append(Batch({name: part[index] for name, part in parts.items()}))
        return pieces

    def _schedule(self) -> PipelineSchedule:
        """Return the schedule for the current number and shape of microbatches."""
        key = len(self._pieces), self._pieces[0][self._tokens].shape
        if key not in self._schedules:
            self._schedules[key] = build_pipeline_schedule(
                self._section.pipeline_parallel_schedule,
                self._section.pipeline_parallel_schedule_csv,
                [self._pipeline_stage(stage) for stage in self._stages],
                len(self._pieces),
                self._loss_of_step,
            )
        return self._schedules[key]

    def _pipeline_stage(self, stage: int) -> PipelineStage:
        """Return torch's view of a stage; with its shapes given, ranks do not exchange them."""
        tokens = self._pieces[0][self._tokens]
        hidden = self._hidden.empty(tokens, torch.device("meta")).requires_grad_()
        pipeline_stage = PipelineStage(
            self._stages[stage],
            stage,
            len(self._plan.stages),
            self.device,
            input_args=hidden if stage else torch.empty_like(tokens, device="meta"),
            output_args=hidden,
            group=self._group,
        )
        before_stage_forward(pipeline_stage, self._begin_microbatch)
        return pipeline_stage

    def _begin_microbatch(self, index: int) -> None:
        sizes = [len(piece[self._tokens]) for piece in self._pieces[:index]]
        self.streams.begin_microbatch(sum(sizes), self._pieces[index].get(TOKEN_INDEX))

    def _empty_hidden(self, piece: Batch) -> Tensor:
        return self._hidden.empty(piece[self._tokens], self.device)

    def _forward(self, stage: int, piece: Batch, received: Tensor | None) -> Tensor:
        inputs = {name: piece[name] for name in self._other_inputs}
        return self._stages[stage](piece[self._tokens] if received is None else received, **inputs)

    def _loss(self, loss: Loss, hidden: Tensor, piece: Batch) -> Tensor:
        return loss.sum(hidden, self._stages[self._last].head, piece)  # type: ignore[arg-type]

    def _loss_of_step(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Return the loss of microbatch number `index`; called by the schedule."""
        return self._loss(self.loss, hidden, self._pieces[int(index)]) / self._num_targets

    def _transfer(self, op: Callable[..., object], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, tensor, group=self._group, group_peer=peer)
