"""Models that cannot be are refused before anything is built."""

import dataclasses

import pytest

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.models import registry
from torchtitan.models.llama3 import FAMILY
from torchtitan.preflight import MODEL, preflight
from torchtitan.preflight.model import build_on_meta, check_static


def context(
    args: dict | None = None, flavor: str = "debugmodel", seq_len: int = 2048
) -> RunContext:
    config = JobConfig.model_validate(
        {"model": {"flavor": flavor, "args": args or {}}, "training": {"seq_len": seq_len}}
    )
    return RunContext(config, world_size=1, device_type="cpu")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            {"dim": 100, "n_heads": 7, "n_kv_heads": 7},
            "n_heads = 7: does not divide model.args.dim",
        ),
        ({"dim": 24, "n_heads": 8}, "n_heads = 8: RoPE needs an even head size, not 3"),
        ({"head_dim": 15}, "head_dim = 15: RoPE needs an even head size, not 15"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3: does not divide model.args.n_heads = 8"),
        ({"n_layers": 0}, "n_layers = 0: must be more than 0"),
        ({"n_layers": 10**9}, "n_layers = 1000000000: must be at most"),
        ({"vocab_size": 0}, "vocab_size = 0: must be more than 0"),
        ({"norm_eps": float("nan")}, "norm_eps = nan: is not a finite number"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor = 0.5: must be at least 1"),
        ({"rope_low_freq_factor": 4}, "rope_low_freq_factor = 4.0: not below"),
        ({"rope_beta_slow": 32}, "rope_beta_slow = 32.0: not below"),
        ({"rope_scaling_type": "dynamic"}, 'rope_scaling_type = "dynamic"'),
        (
            {"n_layer": 2},
            'n_layer: is unknown. Fix: did you mean "n_layers"',
        ),
        ({"tied_embeddings": 1}, "tied_embeddings = 1: needs true or false"),
    ],
)
def test_bad_hyper_parameters(args, expected):
    [problem] = check_static(context(args))
    assert f"model.args.{expected}" in str(problem)


def test_every_flavor_is_fine():
    for flavor in FAMILY.flavors:
        assert check_static(context(flavor=flavor)) == []
        build_on_meta(context(flavor=flavor))


def test_sequences_longer_than_the_model_is_made_for():
    assert check_static(context(seq_len=131072)) == []
    [problem] = check_static(context(seq_len=131073))
    assert "training.seq_len = 131073: longer than model.args.max_seq_len = 131072" in str(problem)
    assert check_static(context({"max_seq_len": 200_000}, seq_len=131073)) == []


def test_a_model_that_does_not_build_is_a_problem(monkeypatch):
    def build(args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(
        registry.MODELS,
        "_registered",
        {"llama3": (dataclasses.replace(FAMILY, build=build), "a test")},
    )
    [problem] = preflight(context({"n_layers": 2}), [MODEL])
    assert "the model cannot be built: RuntimeError: no such kernel" in str(problem)
