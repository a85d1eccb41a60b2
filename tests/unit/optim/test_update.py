"""Steps in the backward: each parameter by itself, after whoever copies it was told."""

from unittest import mock

import pytest
import torch
from torch import nn

from torchtitan.config import JobConfig
from torchtitan.config.schema import Optimizer
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.optim.update import OptimizerInBackward
from torchtitan.training import builder

CPU = torch.device("cpu")
SECTION = {"lr": 0.1, "param_groups": [{"pattern": "1.*", "weight_decay": 0.0, "lr_factor": 0.5}]}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.RMSNorm(5), nn.Linear(5, 2, bias=False))
    model[2].weight.requires_grad_(False)
    return model


def test_one_optimizer_for_each_parameter_in_its_group() -> None:
    model = build()
    section = Optimizer(early_step_in_backward=True, **SECTION)  # type: ignore[arg-type]
    optimizers = build_optimizers(section, [model], CPU)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert [group["params"] for group in groups] == [[model[0].weight], [model[1].weight]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [group["lr_factor"] for group in groups] == [1.0, 0.5]


def test_who_copies_is_told_before_anything_changes() -> None:
    model = build()
    section = Optimizer(early_step_in_backward=True, **SECTION)  # type: ignore[arg-type]
    optimizers = build_optimizers(section, [model], CPU)
    weights = [optimizer.param_groups[0]["params"][0] for optimizer in optimizers]
    before = [weight.detach().clone() for weight in weights]
    seen: list[list[bool]] = []

    def unchanged() -> list[bool]:
        return [torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]

    update = OptimizerInBackward(optimizers, 1, lambda: seen.append(unchanged()), weights[0])
    model(torch.ones(2, 3)).sum().backward()
    assert seen == [[True, True], [True, False]]  # the last layer's first
    assert unchanged() == [False, False]
    assert [weight.grad for weight in weights] == [None, None]
    update.step(torch.tensor(True))  # leaves nothing to do
    assert unchanged() == [False, False]


def test_in_a_run_it_is_the_saver_that_copies() -> None:
    model, manager = build(), mock.Mock()
    config = JobConfig.model_validate({"optimizer": {"early_step_in_backward": True, **SECTION}})
    dims = ParallelDims.from_section(config.parallelism, 1)
    optimizers = build_optimizers(config.optimizer, [model], CPU)
    built = mock.Mock(parameters=list(model.parameters()), tied=(), uncounted=[])
    update = builder.build_update(config, built, optimizers, dims, manager)
    model(torch.ones(2, 3)).sum().backward()
    assert manager.wait_for_staging.call_count == len(optimizers) == 2
    update.step(torch.tensor(True))


def test_two_gradients_of_a_parameter_in_one_step_are_noticed() -> None:
    """They would be two steps."""
    model = build()
    section = Optimizer(early_step_in_backward=True, **SECTION)  # type: ignore[arg-type]
    optimizers = build_optimizers(section, [model], CPU)
    update = OptimizerInBackward(optimizers, 1, lambda: None, model[0].weight)
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(AssertionError, match="two gradients"):
        model(torch.ones(2, 3)).sum().backward()
    del update
    with pytest.raises(AssertionError, match="was freed"):
        model(torch.ones(2, 3)).sum().backward()
