"""Attention masks by name, for the handler `flex_attention`. No torch.

A mask is a function that takes `torchtitan.models.masks.MaskInputs` and returns a function of token
pairs. A third party adds one by the decorator `register_mask`, or by an entry point of the group
`torchtitan.masks` that gives the function or a `MaskEntry`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torchtitan.config.registry import Registry, lazily

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MaskEntry:
    """A mask: a function that imports and returns the mask function."""

    load: Callable[[], Callable[..., Any]]
    description: str = ""


def entry_of(name: str, thing: Any) -> MaskEntry:
    """Return the entry of what is registered under `name`. Raises TypeError if it is no mask."""
    if isinstance(thing, MaskEntry):
        return thing
    if isinstance(thing, type) or not callable(thing):
        raise TypeError(f"the mask {name} is neither a function nor a MaskEntry")
    return MaskEntry(lambda: thing, (thing.__doc__ or "").strip().partition("\n")[0])


MASKS: Registry[MaskEntry] = Registry("handlers.flex_attention.masks", "torchtitan.masks", entry_of)
CAUSAL, DOCUMENT, WINDOW = "causal", "document", "sliding_window"
for _name, _text in {
    CAUSAL: "earlier tokens and the token itself; always in force",
    DOCUMENT: "the same document; with training.document_mask",
    WINDOW: "the last tokens; with handlers.flex_attention.window or model.args.sliding_window",
}.items():
    MASKS.add_built_in(_name, MaskEntry(lazily(f"torchtitan.models.masks:{_name}"), _text))


def register_mask(name: str) -> Callable[[F], F]:
    """Decorate a function to make it available as the mask `name`.

    Raises ValueError for a taken name, TypeError for what is not a function.
    """
    return MASKS.decorator(name)
