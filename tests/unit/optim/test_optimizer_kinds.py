"""Each optimizer against torch's own, its fresh state, and steps that must leave no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchtitan.checkpoint.state import optimizer_tensors
from torchtitan.config import ConfigError
from torchtitan.config.schema import Optimizer
from torchtitan.distributed.context import fake_world
from torchtitan.optim.low_memory_adamw import levels, stochastic_round
from torchtitan.optim.optimizer import build_optimizers, step_optimizers

CPU = torch.device("cpu")
GROUPS = [{"pattern": "*norm.weight", "weight_decay": 0.0}]
SECTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"name": "SGD"},
    "momentum": {"name": "SGD", "args": {"momentum": 0.9}, "implementation": "for-loop"},
    "nesterov": {"name": "SGD", "args": {"momentum": 0.9, "nesterov": True}},
    "Adafactor": {"name": "Adafactor"},
    "Adafactor's": {"name": "Adafactor", "args": {"beta2_decay": -0.5, "eps2": 0.1, "d": 1.2}},
    "Muon": {"name": "Muon", "args": {"patterns": ["w?.*"]}},
    "Muon's": {
        "name": "Muon",
        "args": {
            "patterns": ["w2.*"],
            "momentum": 0.5,
            "nesterov": False,
            "ns_steps": 3,
            "adjust_lr_fn": "original",
            "lr_factor": 2.0,
        },
    },
    "all by Muon": {"name": "Muon", "args": {"patterns": ["*"]}, "param_groups": []},
}

COMPACT: dict[str, dict[str, Any]] = {
    "AdamWBF16": {"name": "AdamWBF16"},
    "AdamW8bit": {"name": "AdamW8bit", "args": {"block_size": 32}},
}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w1 = nn.Linear(6, 10, bias=False)
        self.w2 = nn.Linear(10, 6, bias=False)
        if norm:
            self.norm = nn.RMSNorm(6)
        self.output = nn.Linear(6, 7, bias=False)
        self.to(dtype)


class Wide(nn.Module):
    """Of a matrix that is kept in 8 bits, one too small for it, one of odd rows, and a vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w1 = nn.Linear(64, 96, bias=False)
        self.w2 = nn.Linear(64, 8, bias=False)
        self.w3 = nn.Linear(100, 60, bias=False)
        self.norm = nn.RMSNorm(6)
        self.to(dtype)


def model_for(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return Wide(dtype) if kind in COMPACT else Model(dtype, norm=kind != "all by Muon")


def build(model: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    section = {"lr": 0.1, "weight_decay": 0.3, "param_groups": GROUPS, **(SECTIONS | COMPACT)[kind]}
    return build_optimizers(Optimizer(**section), [model], CPU)


def set_gradients(model: nn.Module, seed: int, poison: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        if poison is not None:
            param.grad.view(-1)[0] = poison


def torchs(model: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    """What torch has for it."""
    settings = dict(SECTIONS[kind].get("args", {}))
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    chosen = {"Muon": ["w1", "w2"], "Muon's": ["w2"], "all by Muon": ["w1", "w2", "output"]}
    muons = [p for p in model.parameters() if names[id(p)].split(".")[0] in chosen.get(kind, [])]
    others = [p for p in model.parameters() if all(p is not muon for muon in muons)]
    groups = [
        {"params": [p], "weight_decay": 0.0 if "norm" in names[id(p)] else 0.3} for p in others
    ]
    if kind.startswith("Adafactor"):
        eps = (None, settings.pop("eps2", 1e-3))
        return [torch.optim.Adafactor(groups, lr=0.1, eps=eps, **settings)]
    if not muons:
        return [torch.optim.SGD(groups, lr=0.1, **settings)]
    settings.pop("patterns")
    lr = 0.1 * settings.pop("lr_factor", 1.0)
    settings = {"adjust_lr_fn": "match_rms_adamw", **settings}
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(muons, lr=lr, weight_decay=0.3, **settings)
    ]
    if groups:
        made.append(torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=True))
    return made


@pytest.mark.parametrize("kind", SECTIONS)
def test_equal_to_torchs(kind: str) -> None:
    """To the bit, but for Adafactor, which adds up in another order."""
    ours, theirs = model_for(kind), model_for(kind)
    own, others = build(ours, kind), torchs(theirs, kind)
    for optimizer in own:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group["lr_factor"]  # as the loop does
    for step in range(4):
        for model, optimizers in ((ours, own), (theirs, others)):
            set_gradients(model, step)
            for optimizer in optimizers:
                optimizer.step()
    exact = not kind.startswith("Adafactor")
    for name, tensor in ours.named_parameters():
        expected = theirs.get_parameter(name)
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(tensor, expected, **tolerance, msg=f"{kind} {name}")
        assert not torch.equal(tensor, model_for(kind).get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", SECTIONS | COMPACT)
def test_fresh_state_is_what_the_first_step_starts_from(kind: str, dtype: torch.dtype) -> None:
    """A checkpoint is loaded into it."""
    states = []
    for create in (False, True):
        model = model_for(kind, dtype)
        optimizers = build(model, kind)
        fresh = optimizer_tensors([model], optimizers) if create else {}
        assert all(not value.any() for name, value in fresh.items() if "_codes" not in name)
        for step in range(2):
            set_gradients(model, step)
            optimizers[0].step()
        state = optimizer_tensors([model], optimizers)
        assert not create or fresh.keys() == state.keys()
        states.append(state | dict(model.named_parameters()))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", SECTIONS | COMPACT)
def test_a_step_that_is_not_finite_leaves_no_trace(kind: str, poison: float) -> None:
    model = model_for(kind)
    optimizers = build(model, kind)
    for step, is_finite in enumerate([False, True, False]):
        tensors = optimizer_tensors([model], optimizers) | dict(model.named_parameters())
        before = {name: value.detach().clone() for name, value in tensors.items()}
        set_gradients(model, step, None if is_finite else poison)
        step_optimizers(optimizers, torch.tensor(is_finite))
        same = all(torch.equal(before[name], value) for name, value in tensors.items())
        assert same != is_finite


def test_parameters_without_a_gradient_are_left_alone() -> None:
    for kind in SECTIONS | COMPACT:
        model = model_for(kind)
        build(model, kind)[0].step()
        for name, tensor in model_for(kind).named_parameters():
            assert torch.equal(model.get_parameter(name), tensor)


@pytest.mark.parametrize("kind", COMPACT)
def test_compact_moments_do_what_adamw_does(kind: str) -> None:
    """Updates, not weights, are compared: of 60 steps whose gradients change but have a mean."""
    found = []
    for section in (COMPACT[kind], {"name": "AdamW"}):
        model = Wide(torch.float32)
        start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        [optimizer] = build_optimizers(Optimizer(lr=1e-3, **section), [model], CPU)
        for step in range(60):
            set_gradients(model, step)
            for parameter in model.parameters():
                parameter.grad.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            optimizer.step()
        found.append({name: t.detach() - start[name] for name, t in model.named_parameters()})
    for name, update in found[0].items():
        expected = found[1][name]
        difference = (update - expected).norm() / expected.norm()
        is_compact = kind == "AdamWBF16" or name == "w1.weight"
        assert (difference > 1e-4) == is_compact, name
        assert difference < (0.03 if is_compact else 1e-5), name


def test_what_is_kept_in_8_bits() -> None:
    model = Wide(torch.float32)
    [optimizer] = build(model, "AdamW8bit")
    state = optimizer_tensors([model], [optimizer])
    names = {name.removeprefix("optimizer.") for name in state if "exp_avg_sq" in name}
    assert names == {
        "w1.weight.exp_avg_sq_codes",
        "w1.weight.exp_avg_sq_scale",
        "w2.weight.exp_avg_sq",
        "w3.weight.exp_avg_sq",
        "norm.weight.exp_avg_sq",
    }
    assert state["optimizer.w1.weight.exp_avg_codes"].dtype == torch.uint8
    assert state["optimizer.w1.weight.exp_avg_scale"].shape == (96, 2)


def test_no_second_moment_vanishes_in_8_bits() -> None:
    """Weights whose gradients are small beside those of their block, and then stop: the average of
    gradients is kept longer than that of their squares, by which it is divided."""
    model = nn.Linear(64, 64, bias=False)
    start = model.weight.detach().clone()
    section = Optimizer(lr=1e-3, weight_decay=0.0, param_groups=(), **COMPACT["AdamW8bit"])
    [optimizer] = build_optimizers(section, [model], CPU)
    for step in range(10):
        set_gradients(model, step)
        assert model.weight.grad is not None
        model.weight.grad[:, ::7] = 2e-4 if step == 0 else 0.0
        model.weight.grad[:, 1::7] *= 1e-5
        optimizer.step()
    moved = (model.weight - start).abs()
    assert moved.max() < 10 * 1.1e-3
    assert moved[:, ::7].min() > 1e-3


@pytest.mark.parametrize("signed", [True, False])
def test_the_numbers_of_8_bits(signed: bool) -> None:
    known = levels(signed)
    assert len(set(known)) == 256 and 0.0 in known and known[-1] == 1.0
    assert (known[0] < -0.99) == signed
    assert min(abs(x) for x in known if x) == pytest.approx(0.55e-6 if signed else 0.325e-6)


def test_rounding_by_chance_is_right_on_average() -> None:
    value = torch.tensor([1.001, -1.001, 3e-5, 0.0, 1.0]).repeat(20_000, 1)
    bits = torch.randint(-(2**63), 2**63 - 1, value.shape, generator=torch.Generator())
    rounded = stochastic_round(value, bits)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double().mean(0), value[0].double(), rtol=1e-4, atol=0)
    assert set(rounded[:, 0].tolist()) == {1.0, 1.0078125}
    assert torch.equal(rounded[:, 4].unique(), torch.ones(1, dtype=torch.bfloat16))


def test_rounding_by_chance_keeps_what_is_no_number() -> None:
    """A GPU's NaN, a CPU's, and infinities."""
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32)
    value = patterns.view(torch.float32)
    for bits in (0, 1, 0xFFFF):
        rounded = stochastic_round(value, torch.full((4,), bits)).float()
        assert torch.equal(rounded.nan_to_num(7.0, 8.0, -8.0), torch.tensor([7, 7, 8, -8.0]))


def test_weights_in_bfloat16_learn_what_rounding_would_lose() -> None:
    """Steps of a thousandth of the distance to the next number."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    section = Optimizer(name="AdamWBF16", lr=1e-5, weight_decay=0.0, param_groups=())
    [optimizer] = build_optimizers(section, [model], CPU)
    for _ in range(50):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert model.weight.double().mean().item() == pytest.approx(1 - 50 * 1e-5, abs=1e-4)


def test_groups_meet_muon_s_patterns() -> None:
    """`optimizer.param_groups` say decay and rate of matrices, and of the others, by name."""
    section = Optimizer(
        name="Muon",
        param_groups=[{"pattern": "w1.*", "lr_factor": 0.5}, {"pattern": "output.*"}],
        args={"patterns": ["w?.weight"], "lr_factor": 4.0},
    )
    [optimizer] = build_optimizers(section, [Model()], CPU)
    found = {
        tuple(group["names"]): (group["orthogonal"], group["lr_factor"])
        for group in optimizer.param_groups
    }
    assert found == {
        ("w1.weight",): (True, 2.0),
        ("output.weight",): (False, 1.0),
        ("w2.weight",): (True, 4.0),
        ("norm.weight",): (False, 1.0),
    }


def test_a_part_without_trained_parameters_has_no_optimizer() -> None:
    parts = [Model(), Model()]
    parts[0].requires_grad_(False)
    for section in (Optimizer(param_groups=()), Optimizer(name="Muon", param_groups=())):
        [optimizer] = build_optimizers(section, parts, CPU)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in parts[1].parameters()}


def test_settings_are_checked_where_they_are_used() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.args\.momentun"):
        build_optimizers(Optimizer(name="SGD", args={"momentun": 0.9}), [Model()], CPU)


def counting(make: Callable[[], Any]) -> type[torch.optim.Optimizer]:
    class Counting(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def initial_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
            return {"step": make()}

    return Counting


def test_state_that_a_checkpoint_would_lose_is_refused() -> None:
    model = nn.Linear(2, 2)
    numbers = counting(lambda: 0)(model.parameters())
    with pytest.raises(TypeError, match=r"Counting keeps optimizer.weight.step as int"):
        optimizer_tensors([model], [numbers])
    tensors = counting(lambda: torch.zeros(()))(model.parameters())
    assert set(optimizer_tensors([model], [tensors])) == {
        "optimizer.weight.step",
        "optimizer.bias.step",
    }


@pytest.mark.parametrize(("ranks", "block", "accepted"), [(2, 16, 24), (2, 48, 24), (4, 16, None)])
def test_blocks_that_ranks_would_cut(ranks: int, block: int, accepted: int | None) -> None:
    section = Optimizer(name="AdamW8bit", args={"block_size": block})
    with fake_world(0, ranks):
        linear = nn.Linear(48, 256, bias=False)
        weight = distribute_tensor(linear.weight, init_device_mesh("cpu", (ranks,)), [Shard(1)])
        linear.weight = nn.Parameter(weight)
        with pytest.raises(ConfigError) as caught:
            build_optimizers(section, [linear], CPU, ["weight"])
        fix = f"set it to a divisor of {48 // ranks}, or shard rows over fewer ranks"
        assert fix in str(caught.value)
        if accepted is not None:
            advised = section.model_copy(update={"args": {"block_size": accepted}})
            build_optimizers(advised, [linear], CPU, ["weight"])
