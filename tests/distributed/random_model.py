"""A handler that makes a Llama random."""

from typing import Any

from tests.distributed.own_models import add_dropout
from torchtitan.handlers.registry import register_handler


@register_handler("random_model")
class RandomModel:
    """Adds dropout in every place that a mesh treats differently."""

    def __init__(self, job_config: Any, parallel_dims: Any):
        pass

    def convert(self, model: Any) -> None:
        add_dropout(model)

    def pre_optimizer_hook(self, model: Any) -> None:
        pass

    def post_optimizer_hook(self, model: Any) -> None:
        pass
