"""Settings of the built-in loss. No torch."""

from typing import Annotated

from pydantic import Field

from torchtitan.config.schema import NonNegativeFloat, Section


class CrossEntropySettings(Section):
    z_loss_weight: NonNegativeFloat = 0.0
    """Adds this times the mean of log(Z)^2 over the targets, where Z is the sum of the
    exponentials of a token's logits: it keeps logits from drifting. PaLM's is 1e-4; 0 is off."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """This much of a target's probability is spread evenly over the whole vocabulary, as in
    `torch.nn.functional.cross_entropy`; 0 is off."""

    @property
    def plain(self) -> bool:
        """Whether it is the cross entropy and nothing else."""
        return not self.z_loss_weight and not self.label_smoothing
