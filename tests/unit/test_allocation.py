"""Where parameters and buffers of a model get their memory."""

import pytest
import torch
from torch import nn

from torchtitan.training.model_builder import _allocate


@pytest.mark.parametrize("on_host", [False, True])
def test_parameters_may_be_on_the_host_and_buffers_may_not(on_host: bool) -> None:
    """The meta device stands in for one that is not the host."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    _allocate(model, torch.device("meta"), parameters_on_host=on_host)
    expected = "cpu" if on_host else "meta"
    assert {parameter.device.type for parameter in model.parameters()} == {expected}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert [name for name, _ in model.named_buffers()] == [
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
