"""The handler `flex_attention`: attention by FlexAttention, under masks that are chosen by name.

The masks of a batch are made of functions of pairs of tokens; the kernel skips what no query of a
block sees. Without the handler that is done on CUDA for documents and windows only, and plainly
causal attention is left to scaled_dot_product_attention.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchtitan.config import JobConfig, Problem
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.flex_attention_settings import (
    NAME,
    Settings,
    chosen_masks,
    chosen_window,
)
from torchtitan.handlers.mask_registry import MASKS
from torchtitan.handlers.registry import handler_settings
from torchtitan.models.attend import Mask, Masks, block_mask
from torchtitan.models.masks import MaskFunction, MaskInputs, all_of, dense


class FlexMasks(Masks):
    """Instead of `Masks`: of other masks, too, and for plain causality as well."""

    def __init__(
        self, window: int | None, makers: Sequence[Callable[[MaskInputs], MaskFunction]]
    ) -> None:
        super().__init__(window)
        self._makers = tuple(makers)

    def build(self, document_ids: Tensor | None, seq_len: int, device: torch.device) -> Mask:
        """See `Masks`. A token sees itself, whatever the masks say: attention to nothing is no
        number."""
        inputs = MaskInputs(seq_len, document_ids, self.window)
        visible = _or_itself(all_of([make(inputs) for make in self._makers]))
        if device.type == "cuda":
            return block_mask(visible, inputs, device)
        return dense(visible, inputs, device)  # in a rehearsal, for `Attend` to take


def _or_itself(function: MaskFunction) -> MaskFunction:
    return lambda batch, query, key: function(batch, query, key) | (query == key)


class FlexAttentionHandler:
    """Replaces what makes the masks; `Attend` takes the kernel that fits them."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self._settings: Settings = handler_settings(job_config, NAME)
        self._document_mask = job_config.training.document_mask

    def check(self, model: nn.Module) -> list[Problem]:
        """Models that attend in a way of their own."""
        if any(isinstance(module, Masks) for module in model.modules()):
            return []
        problem = "the model does not attend by way of torchtitan.models.attend"
        return [Problem("model.handlers", problem, "leave it out", NAME)]

    def convert(self, model: nn.Module) -> None:
        """In place."""
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Masks):
                    setattr(module, name, self._masks_instead_of(child))

    def _masks_instead_of(self, masks: Masks) -> FlexMasks:
        window = chosen_window(self._settings, masks.window)
        names = chosen_masks(self._settings, self._document_mask, window)
        return FlexMasks(window, [MASKS[name].load() for name in names])

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""
