"""Mistakes of pipelines, to be put back one at a time; see `historical_bugs.py`."""

import torch

from tests.parity.bugs import Patches, shows_on, square_sum
from tests.parity.table import FULL, PACKED, TIED, row
from torchtitan.models.batch import Batch
from torchtitan.optim import update
from torchtitan.parallel.pipeline import runner as pipeline_runner
from torchtitan.parallel.pipeline.runner import PipelineRunner
from torchtitan.training import model_builder


@shows_on(row(pp=2, schedule="GPipe"))
def pipeline_averages_over_microbatches(patches: Patches) -> None:
    """The default of torch's schedules."""

    def scaled(original, *args):
        schedule = original(*args)
        schedule.scale_grads = True
        return schedule

    patches.put(pipeline_runner, "build_pipeline_schedule", scaled)


@shows_on(row(pp=2, schedule="GPipe"))
def pipeline_divides_after_the_backward(patches: Patches) -> None:
    """The reported loss is a mean, the gradients are those of the sum."""

    def undivided(original, self, hidden, index):
        return original(self, hidden, index) * self._num_targets

    def divide(original, self, batches, num_targets):
        return original(self, batches, num_targets) / num_targets

    patches.put(PipelineRunner, "_loss_of_step", undivided)
    patches.put(PipelineRunner, "forward_backward", divide)


@shows_on(row(pp=2, schedule="GPipe"))
def norm_of_the_own_stage(patches: Patches) -> None:
    """Every stage clips by its own norm."""
    patches.put(update, "gradient_norm", lambda original, *args: square_sum(*args).sqrt())


@shows_on(row(pp=2, schedule="GPipe", **TIED))
def ends_of_a_tied_pipeline_stay_apart(patches: Patches) -> None:
    """Embedding and head train with their own gradients."""
    patches.put(pipeline_runner, "sum_tied_gradients", lambda original, *args: None)


@shows_on(row(pp=2, schedule="GPipe", **TIED))
def tied_weight_is_counted_at_both_ends(patches: Patches) -> None:
    """The norm has the squares of both copies' gradient."""
    patches.put(update, "gradient_norm", lambda original, *args: original(*args[:2]))


@shows_on(row(FULL, pp=2, schedule="1F1B", microbatches=2, **PACKED))
def pipeline_forgets_accumulated_gradients(patches: Patches) -> None:
    """Setting up the stages for the next batch clears them."""

    def one_by_one(original, self, batches, num_targets):
        total = torch.zeros(())
        for batch in batches:
            for part in self._stages.values():
                part.zero_grad()
            total = total + original(self, [batch], num_targets)
        return total

    patches.put(PipelineRunner, "forward_backward", one_by_one)


@shows_on(row(FULL, pp=2, schedule="1F1B", microbatches=2, **PACKED))
def pipeline_reuses_the_first_documents(patches: Patches) -> None:
    """What is not handed from stage to stage is that of the first microbatch."""

    def of_first(original, self, batches):
        pieces = original(self, batches)
        return [Batch(piece, document_ids=pieces[0]["document_ids"]) for piece in pieces]

    patches.put(PipelineRunner, "_split", of_first)


@shows_on(row(pp=2, schedule="GPipe"))
def depth_is_counted_in_each_stage(patches: Patches) -> None:
    """Initial weights that depend on the depth take every stage for the first."""

    def from_zero(original, named, rule, seed):
        first = min(int(name.split(".")[1]) for name, _ in named if name.startswith("layers."))

        def rule_of_stage(name):
            kind, depth, *rest = name.split(".")
            return rule(".".join([kind, str(int(depth) - first), *rest]) if rest else name)

        original(named, rule_of_stage, seed)

    patches.put(model_builder, "initialize_tensors", from_zero)
