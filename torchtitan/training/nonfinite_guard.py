"""Detecting a step that is not finite, without making the host wait for every step.

The device skips the update of such a step, so the host may learn of it late: on a GPU one step
later, when reading the flag no longer stalls the device, but before the next update. (A step in
the backward cannot be skipped: the weights are lost, but nothing is saved before the host knows.) A
skipped update does not mean that the weights are good, because an earlier one may have spoilt them;
so the error reports which are not finite.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.state import model_tensors, non_finite_tensors, optimizer_tensors
from torchtitan.config import JobConfig, NonFiniteError
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.parallel.runner import Runner
from torchtitan.training.loss_spikes import LossSpikes
from torchtitan.training.model_builder import BuiltModel
from torchtitan.training.nonfinite_origin import StepBatch, find_origin
from torchtitan.utils.text import some_of

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Stops at a step that was not finite, or counts it, at most `lag` steps late.

    The flags are the same on all ranks (they come from reduced values), and so is what follows.
    """

    def __init__(
        self,
        lag: int,
        left_out: bool = True,
        find_non_finite: Callable[[], str] = lambda: "",
        find_origin: Callable[[StepBatch], str] = lambda batch: "",
        describe_newest: Callable[[], str] = lambda: "",
        spikes: LossSpikes | None = None,
        skip_non_finite: bool = False,
        most_skipped: int = 0,
    ):
        """Create the guard; `left_out`: the optimizer skips steps that are not finite.

        With `skip_non_finite` (or `spikes.skips`), `most_skipped` of them in a row are counted and
        the next one is an error; else the first one is. For the message, on all ranks:
        `find_non_finite` names weights and optimizer state that are not finite, `find_origin` the
        module in which a step began to be so, `describe_newest` the checkpoint to continue from.
        """
        self.num_skipped = 0
        """Steps that were skipped since the start of the run; set it on a resume."""
        self._in_a_row = 0
        self._lag = lag
        self._left_out = left_out
        self._most_skipped = most_skipped
        self._find_non_finite = find_non_finite
        self._find_origin = find_origin
        self._describe_newest = describe_newest
        self._spikes = spikes
        self._skip_non_finite = skip_non_finite
        self._pending: deque[tuple[StepBatch, Tensor, torch.cuda.Event | None]] = deque()

    def record(self, batch: StepBatch, loss: Tensor, norm: Tensor) -> Tensor:
        """Return whether to make the step's update, a bool scalar on the device of `norm`.

        `loss` and `norm` are scalars, the same on all ranks. Call it before the update. Raises
        NonFiniteError for this step or, on a GPU, for the one before, whose update was left out and
        whose weights are still there.
        """
        loss = loss.detach().to(norm.device)
        good = torch.isfinite(norm) & torch.isfinite(loss)
        score = torch.zeros_like(loss) if self._spikes is None else self._spikes.score(loss)
        facts = torch.stack([good.double(), loss.double(), score.double()])
        facts = facts.to("cpu", non_blocking=True)
        ready = None
        if norm.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append((batch, facts, ready))
        while len(self._pending) > self._lag:
            self._check()
        if self._spikes is not None and self._spikes.skips:
            good &= score <= self._spikes.threshold
        return good

    @property
    def recent_losses(self) -> list[float] | None:
        """The losses by which the next one is a spike or not; None without detection."""
        return None if self._spikes is None else self._spikes.recent

    def flush(self) -> None:
        """Wait for all steps so far; call before saving their result."""
        while self._pending:
            self._check()

    def _check(self) -> None:
        batch, facts, ready = self._pending.popleft()
        if ready is not None:
            ready.synchronize()
        is_finite, loss, score = facts.tolist()
        if not is_finite:
            what, is_spoilt = self._describe_non_finite(batch)
            self._skip(batch.step, what, self._skip_non_finite and not is_spoilt)
        elif self._spikes is not None and score > self._spikes.threshold:
            what = (
                f"the loss {loss:.4f} is a spike, {score:.1f} standard deviations above the median"
                " of the steps before it."
            )
            if self._spikes.skips:
                self._skip(batch.step, f"{what} Its update was left out.", True)
            else:
                self._in_a_row = 0
                logger.warning("step %d: %s", batch.step, what)
        else:
            self._in_a_row = 0

    def _skip(self, step: int, what: str, may_skip: bool) -> None:
        """Count a step whose update was left out, or raise."""
        self._in_a_row += 1
        if may_skip and self._in_a_row <= self._most_skipped:
            self.num_skipped += 1
            logger.warning("step %d: %s", step, what)
            return
        if may_skip:
            what += (
                f" These are more in a row than training.max_skipped_steps = {self._most_skipped}."
            )
        raise NonFiniteError(
            f"step {step}: {what} Lower optimizer.lr, lengthen the warmup, or look at the data of"
            f" that step. {self._describe_newest()}"
        )

    def _describe_non_finite(self, batch: StepBatch) -> tuple[str, bool]:
        """Return what is known of such a step, and whether weights or moments are lost."""
        spoilt = self._find_non_finite()
        facts = (
            "the loss or the gradient norm is not finite.",
            self._state(spoilt),
            self._find_origin(batch),
        )
        return " ".join(filter(None, facts)), bool(spoilt)

    def _state(self, spoilt: str) -> str:
        """Describe the weights, of which `spoilt` are not finite."""
        if not self._left_out:
            lost = f" These hold NaN or infinity: {spoilt}." if spoilt else ""
            return f"With optimizer.early_step_in_backward it has changed the weights.{lost}"
        if not spoilt:
            return "Its update was left out, and all weights and optimizer state are finite."
        return (
            f"Its update was left out, but these hold NaN or infinity: {spoilt}. The update of an"
            " earlier step, or a handler's hook, has made them so."
        )


def build_nonfinite_guard(
    config: JobConfig,
    world: DistributedContext,
    model: BuiltModel,
    optimizers: Sequence[torch.optim.Optimizer],
    manager: CheckpointManager,
    runner: Runner,
    tokenizer: Tokenizer,
) -> NonFiniteGuard:
    """Build the guard that ends a run at a step that is not finite, or counts such steps."""
    training = config.training
    may_skip = "skip" in (training.on_non_finite, training.on_loss_spike)
    in_backward = config.optimizer.early_step_in_backward

    def find_non_finite() -> str:
        tensors = model_tensors(model.parts) | optimizer_tensors(model.parts, optimizers)
        return some_of(non_finite_tensors(world, tensors, model.parts))

    def origin(batch: StepBatch) -> str:
        # In the backward the weights have changed, and a second pass would change them again.
        if in_backward:
            return ""
        return find_origin(world, model, runner, batch, tokenizer.decode, may_skip)

    spikes = None
    if training.on_loss_spike != "ignore":
        spikes = LossSpikes(
            training.loss_spike_threshold,
            training.loss_spike_window,
            model.parameters[0].device,  # where the norm is, with CPU offload too
            manager.state.recent_losses,
            skips=training.on_loss_spike == "skip",
        )
    guard = NonFiniteGuard(
        lag=0 if world.device.type == "cpu" else 1,
        left_out=not in_backward,
        find_non_finite=find_non_finite,
        find_origin=origin,
        describe_newest=manager.describe_newest,
        spikes=spikes,
        skip_non_finite=training.on_non_finite == "skip",
        most_skipped=training.max_skipped_steps,
    )
    guard.num_skipped = manager.state.skipped_steps
    return guard
