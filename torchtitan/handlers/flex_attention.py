"""The handler `flex_attention`: FlexAttention under masks chosen by name.

A mask is a function of token pairs; the kernel skips blocks that no query sees. Without the handler
FlexAttention serves documents and windows on CUDA only, and plain causal attention uses
scaled_dot_product_attention.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.masks import MASKS
from torchtitan.handlers.registry import handler_settings
from torchtitan.handlers.settings import FlexAttentionSettings
from torchtitan.models.attention import AttentionMaskBuilder, Mask, build_mask
from torchtitan.models.masks import MaskFunction, MaskInputs, all_of


class FlexMasks(AttentionMaskBuilder):
    """Builds masks of any registered kind, for plain causal attention as well."""

    def __init__(
        self, window: int | None, makers: Sequence[Callable[[MaskInputs], MaskFunction]]
    ) -> None:
        super().__init__(window)
        self._makers = tuple(makers)

    def build(self, document_ids: Tensor | None, seq_len: int, device: torch.device) -> Mask:
        """Return the mask. A token always sees itself, because attention to nothing is NaN."""
        inputs = MaskInputs(seq_len, document_ids, self.window)
        visible = _or_itself(all_of([make(inputs) for make in self._makers]))
        return build_mask(visible, inputs, device)


def _or_itself(function: MaskFunction) -> MaskFunction:
    return lambda batch, query, key: function(batch, query, key) | (query == key)


class FlexAttentionHandler(ModelHandler):
    """Replaces the mask builder; `InnerAttention` chooses the kernel that fits the masks."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self._settings: FlexAttentionSettings = handler_settings(job_config, "flex_attention")
        self._document_mask = job_config.training.document_mask

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Find models with an attention of their own."""
        if any(isinstance(module, AttentionMaskBuilder) for module in model.modules()):
            return []
        problem = "the model does not use the attention of torchtitan.models.attention"
        return [ConfigIssue("model.handlers", problem, "leave it out", "flex_attention")]

    def convert(self, model: nn.Module) -> None:
        """Replace the mask builders in place."""
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, AttentionMaskBuilder):
                    setattr(module, name, self._masks_instead_of(child))

    def _masks_instead_of(self, masks: AttentionMaskBuilder) -> FlexMasks:
        window = self._settings.chosen_window(masks.window)
        names = self._settings.chosen_masks(self._document_mask, window)
        return FlexMasks(window, [MASKS[name].load() for name in names])
