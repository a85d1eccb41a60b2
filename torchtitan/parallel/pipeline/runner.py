"""The runner of a model that is cut into the stages of a pipeline.

One run of the schedule covers all microbatches of a step, those of gradient accumulation too: the
pipeline fills and drains once a step, and gradients are reduced over the data ranks once, after the
last backward of a stage. Between stages only hidden states and their gradients travel. What else
the forward and the loss need (positions, documents, labels) every stage has, since all ranks along
the pipeline read the same data.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from torchtitan.models.batch import Batch
from torchtitan.parallel.data_parallel import free_gathered, set_gradient_sync
from torchtitan.parallel.pipeline.schedules import forward_ticks
from torchtitan.parallel.pipeline.stages import PipelinePlan
from torchtitan.parallel.pipeline.tied_weights import TiedWeight, sum_tied_gradients
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.parallel.runner import Loss, add_over_ranks, over_ranks, terms_of
from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.torch_compat import (
    PipelineSchedule,
    before_stage_forward,
    build_pipeline_schedule,
)


class PipelineRunner:
    """Runs this rank's stages; a `Runner`."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        plan: PipelinePlan,
        group: dist.ProcessGroup,
        loss: Loss,
        device: torch.device,
        input_names: Sequence[str],
        *,
        schedule: str,
        schedule_csv: str,
        microbatch_size: int,
        hidden_size: int,
        hidden_dtype: torch.dtype,
        tensor_parallel_degree: int = 1,
        evaluation_loss: Loss | None = None,
        shard_batch: Callable[[Batch], Batch] | None = None,
        is_loss_leader: bool = True,
        streams: RandomStreams | None = None,
        tied: Sequence[TiedWeight] = (),
    ):
        """`parts` are the stages that `plan` gives this rank of `group` (the ranks along the
        pipeline), in order. `input_names`: what the forward takes of a batch, tokens first.
        `microbatch_size` is in sequences; hidden states are `[B, T / tensor_parallel_degree,
        hidden_size]` of `hidden_dtype` between stages. `evaluation_loss`, `shard_batch`,
        `is_loss_leader` and `streams` are those of `SPMDRunner`. `tied`: this rank's copies of
        tied weights."""
        self.loss = loss
        self.evaluation_loss = loss if evaluation_loss is None else evaluation_loss
        self.terms: Mapping[str, Tensor] = {}
        self._plan = plan
        self._group = group
        self._rank = dist.get_rank(group)
        self._stages = dict(zip(plan.held_by(self._rank), parts, strict=True))
        self._last = len(plan.stages) - 1
        self._device = device
        self._tokens, *self._other_inputs = input_names
        self._schedule_name, self._schedule_csv = schedule, schedule_csv
        self._microbatch_size = microbatch_size
        self._hidden_size, self._hidden_dtype = hidden_size, hidden_dtype
        self._tensor_parallel_degree = tensor_parallel_degree
        self._shard_batch = shard_batch
        self._counts_loss = is_loss_leader
        self.streams = RandomStreams(0, device) if streams is None else streams
        for part in parts:
            self.streams.attach(part)
        self._tied = tuple(tied)
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
        sum_tied_gradients(self._tied, self._group, self._device)
        self.streams.end_microbatches()
        total = self._zero()
        for microbatch_loss in losses:
            total += microbatch_loss.detach()
        terms = terms_of(self.loss) if self._last in self._stages else {}
        loss, self.terms = add_over_ranks(self.loss, total, terms, num_targets, self._counts_loss)
        return loss

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Batch]) -> Tensor:
        """See `Runner`. Of any number of microbatches, of any size."""
        self._connect()
        for part in self._stages.values():
            part.eval()
        pieces = self._split(microbatches)
        stage_to_rank = self._plan.stage_to_rank
        hidden: dict[tuple[int, int], Tensor] = {}  # by the stage that needs it, and microbatch
        # Wide, as `SPMDRunner` has it: there may be any number of microbatches.
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for tick in forward_ticks(stage_to_rank, len(pieces)):
            transfers = []
            for rank, (stage, _, index) in tick.items():
                if rank == self._rank:
                    out = self._forward(stage, pieces[index], hidden.pop((stage, index), None))
                    if stage == self._last:
                        total += self._loss(self.evaluation_loss, out, pieces[index])
                    elif stage_to_rank[stage + 1] == rank:
                        hidden[stage + 1, index] = out
                    else:
                        peer = stage_to_rank[stage + 1]
                        transfers.append(self._transfer(dist.isend, out.contiguous(), peer))
                elif stage < self._last and stage_to_rank[stage + 1] == self._rank:
                    hidden[stage + 1, index] = self._empty_hidden(pieces[index], self._device)
                    transfers.append(self._transfer(dist.irecv, hidden[stage + 1, index], rank))
            for work in dist.batch_isend_irecv(transfers) if transfers else []:
                work.wait()
        for part in self._stages.values():
            free_gathered(part)
        return over_ranks(total, self._counts_loss)

    def dry_run(self, batch: Batch) -> None:
        """Forward and backward of each stage of this rank, for one microbatch of `batch`.

        Nothing passes between stages: what they would receive is made up, so this shows what they
        need and not what they compute. Gradients accumulate as in a step.
        """
        piece = self._split([batch])[0]
        for stage, part in self._stages.items():
            part.train()
            set_gradient_sync(part, enabled=True)
            received = self._empty_hidden(piece, self._device).requires_grad_() if stage else None
            out = self._forward(stage, piece, received)
            if stage == self._last:
                self._loss(self.loss, out, piece).backward()
            else:
                out.backward(self._empty_hidden(piece, self._device))

    def _connect(self) -> None:
        """Let all ranks along the pipeline meet once. NCCL connects them in the first exchange of
        the group, which all must take part in, and a pipeline begins with those of few ranks."""
        if not self._connected:
            dist.all_reduce(torch.zeros((), device=self._device), group=self._group)
            self._connected = True

    def _split(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """The pipeline's microbatches, on the device."""
        pieces = []
        for batch in microbatches:
            batch = batch.to(self._device, non_blocking=True)
            if self._shard_batch is not None:
                batch = self._shard_batch(batch)
            parts = {name: tensor.split(self._microbatch_size) for name, tensor in batch.items()}
            for index in range(len(parts[self._tokens])):
                pieces.append(Batch({name: part[index] for name, part in parts.items()}))
        return pieces

    def _schedule(self) -> PipelineSchedule:
        """The schedule for as many microbatches, of such a shape, as there are now."""
        key = len(self._pieces), self._pieces[0][self._tokens].shape
        if key not in self._schedules:
            self._schedules[key] = build_pipeline_schedule(
                self._schedule_name,
                self._schedule_csv,
                [self._pipeline_stage(stage) for stage in self._stages],
                len(self._pieces),
                self._loss_of_step,
            )
        return self._schedules[key]

    def _pipeline_stage(self, stage: int) -> PipelineStage:
        """torch's view of a stage. With the shapes given, ranks need not tell each other theirs."""
        tokens = self._pieces[0][self._tokens]
        hidden = self._empty_hidden(self._pieces[0], torch.device("meta")).requires_grad_()
        pipeline_stage = PipelineStage(
            self._stages[stage],
            stage,
            len(self._plan.stages),
            self._device,
            input_args=hidden if stage else torch.empty_like(tokens, device="meta"),
            output_args=hidden,
            group=self._group,
        )
        before_stage_forward(pipeline_stage, self._begin_microbatch)
        return pipeline_stage

    def _begin_microbatch(self, index: int) -> None:
        sizes = [len(piece[self._tokens]) for piece in self._pieces[:index]]
        self.streams.begin_microbatch(sum(sizes))

    def _empty_hidden(self, piece: Batch, device: torch.device) -> Tensor:
        sequences, tokens = piece[self._tokens].shape
        shape = (sequences, tokens // self._tensor_parallel_degree, self._hidden_size)
        return torch.empty(shape, dtype=self._hidden_dtype, device=device)

    def _forward(self, stage: int, piece: Batch, received: Tensor | None) -> Tensor:
        inputs = {name: piece[name] for name in self._other_inputs}
        return self._stages[stage](piece[self._tokens] if received is None else received, **inputs)

    def _loss(self, loss: Loss, hidden: Tensor, piece: Batch) -> Tensor:
        return loss.sum(hidden, self._stages[self._last].head, piece)  # type: ignore[arg-type]

    def _loss_of_step(self, hidden: Tensor, index: Tensor) -> Tensor:
        """What the schedule calls, in the last stage, for the microbatch of number `index`."""
        return self._loss(self.loss, hidden, self._pieces[int(index)]) / self._num_targets

    def _transfer(self, op: Callable[..., object], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, tensor, group=self._group, group_peer=peer)

    def _zero(self) -> Tensor:
        dtype = at_least_float32(self._hidden_dtype)
        return torch.zeros((), dtype=dtype, device=self._device)
