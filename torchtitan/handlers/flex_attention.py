"""The handler `flex_attention`: attention by FlexAttention, under masks that are chosen by name.

The masks of a batch are made of functions of pairs of tokens; the kernel skips what no query of a
block sees. Without the handler that is done on CUDA for documents and windows only, and plainly
causal attention is left to scaled_dot_product_attention.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.flex_attention_settings import (
    NAME,
    Settings,
    chosen_masks,
    chosen_window,
)
from torchtitan.handlers.mask_registry import MASKS
from torchtitan.handlers.registry import handler_settings
from torchtitan.models.attend import AttentionMaskBuilder, Mask, block_mask
from torchtitan.models.masks import MaskFunction, MaskInputs, all_of, dense


class FlexMasks(AttentionMaskBuilder):
    """Instead of `AttentionMaskBuilder`: of other masks, too, and for plain causality as well."""

    def __init__(
        self, window: int | None, makers: Sequence[Callable[[MaskInputs], MaskFunction]]
    ) -> None:
        super().__init__(window)
        self._makers = tuple(makers)

    def build(self, document_ids: Tensor | None, seq_len: int, device: torch.device) -> Mask:
        """See `AttentionMaskBuilder`. A token always sees itself, whatever the masks say, because
        attention to nothing is NaN."""
        inputs = MaskInputs(seq_len, document_ids, self.window)
        visible = _or_itself(all_of([make(inputs) for make in self._makers]))
        if device.type == "cuda":
            return block_mask(visible, inputs, device)
        return dense(visible, inputs, device)  # in a dry run, for `InnerAttention` to take


def _or_itself(function: MaskFunction) -> MaskFunction:
    return lambda batch, query, key: function(batch, query, key) | (query == key)


class FlexAttentionHandler:
    """Replaces what makes the masks; `InnerAttention` takes the kernel that fits them."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self._settings: Settings = handler_settings(job_config, NAME)
        self._document_mask = job_config.training.document_mask

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Models that attend in a way of their own."""
        if any(isinstance(module, AttentionMaskBuilder) for module in model.modules()):
            return []
        problem = "the model does not attend by way of torchtitan.models.attend"
        return [ConfigIssue("model.handlers", problem, "leave it out", NAME)]

    def convert(self, model: nn.Module) -> None:
        """In place."""
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, AttentionMaskBuilder):
                    setattr(module, name, self._masks_instead_of(child))

    def _masks_instead_of(self, masks: AttentionMaskBuilder) -> FlexMasks:
        window = chosen_window(self._settings, masks.window)
        names = chosen_masks(self._settings, self._document_mask, window)
        return FlexMasks(window, [MASKS[name].load() for name in names])

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""
