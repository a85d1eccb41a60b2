"""Weights that two stages of a pipeline share, such as tied embeddings.

Each of the two stages holds a copy, under the weight's first name. After the last backward of a
step the stages exchange their gradients, so that both copies have the same sum, take the same step
and stay equal bit for bit. A checkpoint holds the weight once.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from torchtitan.models.spec import LanguageModel
from torchtitan.parallel.pipeline.stages import PipelinePlan
from torchtitan.utils.torch_compat import local_tensor


@dataclass(frozen=True)
class TiedWeight:
    """The copies of one weight on this rank: one, or two if the rank holds both stages."""

    parameters: tuple[nn.Parameter, ...]
    peer: int | None
    """The rank along the pipeline that holds the other copy; None: this one."""
    is_counted: bool
    """The gradient norm counts the first of `parameters`; it counts no other copy."""

    @property
    def uncounted(self) -> tuple[nn.Parameter, ...]:
        """The copies that the gradient norm leaves out."""
        return self.parameters[1:] if self.is_counted else self.parameters


def build_stage(model: nn.Module, plan: PipelinePlan, stage: int) -> nn.Module:
    """Return a copy of `model` (on the meta device) with the modules of one stage.

    A module of another stage is kept for a weight that this stage shares with it; its forward
    returns its input.
    """
    part = deepcopy(model)
    assert isinstance(part, LanguageModel)
    sharing = {plan.module_of(name) for name, stages in plan.tied.items() if stage in stages}
    kept_for_weights = sharing.difference(plan.stages[stage])
    part.keep_modules((*plan.stages[stage], *kept_for_weights))
    for name in kept_for_weights:
        part.get_submodule(name).forward = nn.Identity().forward  # type: ignore[attr-defined, method-assign]
    return part


def tied_weights_of(
    plan: PipelinePlan, rank: int, parts: Sequence[nn.Module]
) -> tuple[TiedWeight, ...]:
    """Return the tied weights that this pipeline rank holds; `parts` are its stages, allocated."""
    held = dict(zip(plan.held_by(rank), parts, strict=True))
    found = []
    for name, stages in plan.tied.items():
        copies = [dict(held[stage].named_parameters())[name] for stage in stages if stage in held]
        peers = [plan.stage_to_rank[stage] for stage in stages if stage not in held]
        if copies:
            peer = peers[0] if peers else None
            found.append(TiedWeight(tuple(copies), peer, is_counted=stages[0] in held))
    return tuple(found)


@torch.no_grad()
def sum_tied_gradients(
    weights: Sequence[TiedWeight], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Give each copy of a weight the sum of the copies' gradients.

    All ranks that hold a copy must call it, after the last backward of a step.
    """
    for weight in weights:
        gradients = [local_tensor(copy.grad) for copy in weight.parameters if copy.grad is not None]
        if not gradients or not gradients[0].numel():
            continue  # frozen, or no row of it on this rank
        own = gradients[0]
        if weight.peer is None:
            own.add_(gradients[1])
            gradients[1].copy_(own)
            continue
        sent = own.to(device).contiguous()  # gradients may be in host memory
        received = torch.empty_like(sent)
        transfers = [
            dist.P2POp(dist.isend, sent, group=group, group_peer=weight.peer),
            dist.P2POp(dist.irecv, received, group=group, group_peer=weight.peer),
        ]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        own.add_(received.to(own.device))  # a + b on one side, b + a on the other: the same bits
