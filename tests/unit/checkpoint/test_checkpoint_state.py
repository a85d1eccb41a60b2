"""The flat dicts of tensors: names, tied parameters once, and the state of a fresh optimizer."""

from typing import Any

import pytest
import torch
from torch import nn

from torchtitan.checkpoint.state import model_tensors, optimizer_tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layers = nn.ModuleDict({"4": nn.Linear(3, 3)})
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embed.weight
        self.register_buffer("table", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_names() -> None:
    model = Tied()
    tensors = model_tensors([model])
    assert sorted(tensors) == ["embed.weight", "layers.4.bias", "layers.4.weight", "table"]
    state = optimizer_tensors([model], [torch.optim.AdamW(model.parameters())])
    names = {name.removeprefix("optimizer.").rsplit(".", 1)[0] for name in state}
    assert names == {"embed.weight", "layers.4.bias", "layers.4.weight"}
    assert "optimizer.layers.4.bias.exp_avg_sq" in state and "optimizer.embed.weight.step" in state


def test_values_are_live() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model_tensors([model])["embed.weight"].fill_(3.0)
    assert (model.output.weight == 3.0).all()
    optimizer_tensors([model], [optimizer])["optimizer.embed.weight.exp_avg"].fill_(2.0)
    assert (optimizer.state[model.embed.weight]["exp_avg"] == 2.0).all()


def test_parts_of_a_model() -> None:
    """Pipeline stages of one rank: their names do not overlap."""
    parts = [nn.ModuleDict({str(index): nn.Linear(2, 2)}) for index in (0, 3)]
    optimizers = [torch.optim.Adam(part.parameters()) for part in parts]
    assert sorted(model_tensors(parts)) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    assert len(optimizer_tensors(parts, optimizers)) == 12


def test_frozen_parameters_have_no_state() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    state = optimizer_tensors([model], [torch.optim.AdamW(model.parameters())])
    assert {name.split(".")[1] for name in state} == {"weight"}


def test_unknown_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match="RMSprop"):
        optimizer_tensors([model], [torch.optim.RMSprop(model.parameters())])


@pytest.mark.parametrize(
    "options",
    [{"fused": True}, {"foreach": True}, {"foreach": False}, {"amsgrad": True}],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fresh_state_is_what_the_first_step_starts_from(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    models, states = [], []
    for create in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 4).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        if create:
            optimizer_tensors([model], [optimizer])
        for _ in range(3):
            model(torch.ones(2, 3, dtype=dtype)).square().sum().backward()
            optimizer.step()
        models.append(model_tensors([model]))
        states.append(optimizer_tensors([model], [optimizer]))
    for torchs, ours in (models, states):
        assert torchs.keys() == ours.keys()
        for name, tensor in torchs.items():
            assert tensor.dtype == ours[name].dtype, name
            assert torch.equal(tensor, ours[name]), name
