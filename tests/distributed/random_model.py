"""A handler that makes a Llama random."""

from typing import Any

from tests.distributed.own_models import add_dropout
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import register_handler


@register_handler("random_model")
class RandomModel(ModelHandler):
    """Adds dropout in every place that a mesh treats differently."""

    def convert(self, model: Any) -> None:
        add_dropout(model)
