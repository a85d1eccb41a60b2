"""Parameter groups by name, and steps that must leave no trace."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config import ConfigError
from torchtitan.config.schema import Optimizer
from torchtitan.optim.optimizer import build_optimizers, step_optimizers

CPU = torch.device("cpu")
NAMES = ["Adam", "AdamW"]
IMPLEMENTATIONS = ["for-loop", "foreach", "fused"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(3, 5, bias=False)
        self.norm = nn.RMSNorm(5)
        self.output = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.norm(self.wq(x)))


def group_of(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Any]:
    groups = [g for g in optimizer.param_groups if any(p is param for p in g["params"])]
    assert len(groups) == 1
    return groups[0]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, param in model.named_parameters():
        tensors[name] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().clone()
    return tensors


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def set_gradients(model: nn.Module, seed: int, poison: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        if poison is not None:
            param.grad.view(-1)[0] = poison


def test_groups_by_pattern_first_match_wins() -> None:
    model = Block()
    section = Optimizer(
        weight_decay=0.3,
        param_groups=[
            {"pattern": "*norm.weight", "weight_decay": 0.0},
            {"pattern": "output.*", "lr_factor": 0.5},
            {"pattern": "*", "lr_factor": 2.0},
        ],
    )
    [optimizer] = build_optimizers(section, [model], CPU)
    found = {
        name: (group["weight_decay"], group["lr_factor"])
        for name, param in model.named_parameters()
        for group in [group_of(optimizer, param)]
    }
    assert found == {
        "norm.weight": (0.0, 1.0),
        "output.weight": (0.3, 0.5),
        "wq.weight": (0.3, 2.0),
    }


def test_hyperparameters_reach_the_optimizer() -> None:
    section = Optimizer(name="Adam", lr=0.5, beta1=0.7, beta2=0.8, eps=1e-3, weight_decay=0.25)
    [optimizer] = build_optimizers(section, [Block()], CPU)
    assert type(optimizer) is torch.optim.Adam
    rest = optimizer.param_groups[-1]
    expected = (0.5, (0.7, 0.8), 1e-3, 0.25)
    assert (rest["lr"], rest["betas"], rest["eps"], rest["weight_decay"]) == expected


def test_frozen_parameters_are_left_out_and_tied_ones_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["b"].bias.requires_grad_(False)
    [optimizer] = build_optimizers(Optimizer(param_groups=()), [model], CPU)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert [p is q for p, q in zip(params, [model["a"].weight, model["a"].bias])] == [True, True]
    assert len(params) == 2


def test_one_optimizer_per_part_and_patterns_of_the_whole_model() -> None:
    parts = [nn.ModuleDict({"wq": nn.Linear(2, 2)}), nn.ModuleDict({"norm": nn.RMSNorm(2)})]
    section = Optimizer(param_groups=[{"pattern": "norm*", "weight_decay": 0.0}])
    optimizers = build_optimizers(section, parts, CPU)
    assert [len(o.param_groups) for o in optimizers] == [1, 1]
    assert optimizers[1].param_groups[0]["weight_decay"] == 0.0
    # A pipeline rank without any norm still knows the pattern to be right.
    build_optimizers(section, parts[:1], CPU, all_names=["wq.weight", "norm.weight"])
    with pytest.raises(ConfigError):
        build_optimizers(section, parts[:1], CPU)
    # Only the default's, which a model without weights in its norms has no use for, is left alone.
    build_optimizers(Optimizer(), parts[:1], CPU)


def test_pattern_without_parameters_is_an_error_that_shows_names() -> None:
    section = Optimizer(param_groups=[{"pattern": "*norms.weight"}, {"pattern": "*bias"}])
    with pytest.raises(ConfigError) as caught:
        build_optimizers(section, [Block()], CPU)
    first, second = caught.value.problems
    assert str(first).startswith('optimizer.param_groups[0].pattern = "*norms.weight": ')
    assert "matches no parameter" in first.problem and "wq.weight" in first.fix
    assert second.key == "optimizer.param_groups[1].pattern"


def test_pattern_that_never_wins_is_an_error() -> None:
    section = Optimizer(param_groups=[{"pattern": "*weight"}, {"pattern": "norm.weight"}])
    with pytest.raises(ConfigError, match="earlier patterns already take") as caught:
        build_optimizers(section, [Block()], CPU)
    assert [p.key for p in caught.value.problems] == ["optimizer.param_groups[1].pattern"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementation(implementation: str) -> None:
    section = Optimizer(implementation=implementation)
    [optimizer] = build_optimizers(section, [Block()], CPU)
    for group in optimizer.param_groups:
        assert bool(group["fused"]) == (implementation == "fused")
        assert bool(group["foreach"]) == (implementation == "foreach")


def test_fused_falls_back_to_foreach_on_a_device_without_it() -> None:
    with torch.device("meta"):
        model = Block()
    [optimizer] = build_optimizers(Optimizer(), [model], torch.device("meta"))
    assert optimizer.defaults["foreach"] and not optimizer.defaults["fused"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_leaves_no_trace(
    name: str, implementation: str, dtype: torch.dtype, poison: float
) -> None:
    def build() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = Block().to(dtype)
        section = Optimizer(name=name, implementation=implementation, lr=0.1, weight_decay=0.5)
        return model, build_optimizers(section, [model], CPU)

    disturbed, calm = build(), build()
    for step, is_finite in enumerate([True, False, True, False]):
        model, optimizers = disturbed
        before = snapshot(model, optimizers[0])
        set_gradients(model, step, None if is_finite else poison)
        step_optimizers(optimizers, torch.tensor(is_finite))
        after = snapshot(model, optimizers[0])
        if not is_finite:
            assert_same_bits(before, after)
            continue
        assert not torch.equal(before["wq.weight"], after["wq.weight"])
        set_gradients(calm[0], step)
        calm[1][0].step()
    # The step counters and moments went on as if the bad steps had never been.
    assert_same_bits(snapshot(*[disturbed[0], disturbed[1][0]]), snapshot(calm[0], calm[1][0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_first_step_that_is_not_finite(implementation: str) -> None:
    """There are no moments yet: whatever the implementation makes must be as if new."""
    torch.manual_seed(0)
    models = [Block(), Block()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        build_optimizers(Optimizer(implementation=implementation, lr=0.1), [m], CPU) for m in models
    ]
    set_gradients(models[0], 0, float("nan"))
    step_optimizers(optimizers[0], torch.tensor(False))
    for model, own in zip(models, optimizers):
        set_gradients(model, 1)
        step_optimizers(own, torch.tensor(True))
    assert_same_bits(snapshot(models[0], optimizers[0][0]), snapshot(models[1], optimizers[1][0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_left_out_says_nothing_about_later_ones(implementation: str) -> None:
    model = Block()
    optimizers = build_optimizers(Optimizer(implementation=implementation), [model], CPU)
    set_gradients(model, 0)
    step_optimizers(optimizers, torch.tensor(False))
    before = snapshot(model, optimizers[0])
    optimizers[0].step()
    assert not torch.equal(before["wq.weight"], snapshot(model, optimizers[0])["wq.weight"])


class ReadsByTheHost(TorchDispatchMode):
    """Counts how often the host asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_fused_steps_do_not_make_the_host_wait(implementation: str) -> None:
    model = Block()
    optimizers = build_optimizers(Optimizer(implementation=implementation), [model], CPU)
    set_gradients(model, 0)
    with ReadsByTheHost() as reads:
        step_optimizers(optimizers, torch.tensor(True))
    assert (reads.count == 0) == (implementation == "fused")


@pytest.mark.gpu
@pytest.mark.parametrize("is_finite", [True, False])
def test_fused_step_on_a_gpu_does_not_synchronise(is_finite: bool) -> None:
    device = torch.device("cuda")
    model = Block().to(device)
    optimizers = build_optimizers(Optimizer(lr=0.1), [model], device)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1.0 if is_finite else float("nan"))
    flag = torch.tensor(is_finite, device=device)
    step_optimizers(optimizers, flag)  # makes the state
    before = snapshot(model, optimizers[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_optimizers(optimizers, flag)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = snapshot(model, optimizers[0])
    assert torch.equal(before["wq.weight"], after["wq.weight"]) != is_finite
