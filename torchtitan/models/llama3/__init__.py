"""The Llama 3 family. No torch until a model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan.models.llama3.flavors import FLAVORS, LlamaArgs
from torchtitan.models.spec import ModelFamily

if TYPE_CHECKING:
    from torchtitan.models.llama3.model import Llama


def _build(args: LlamaArgs) -> Llama:
    from torchtitan.models.llama3.model import Llama

    return Llama(args)


FAMILY = ModelFamily(name="llama3", args_type=LlamaArgs, flavors=FLAVORS, build=_build)
