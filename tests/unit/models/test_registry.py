"""Families by name, and hyper-parameters resolved from flavor, overrides and tokenizer."""

import subprocess
import sys

import pytest

from tests.families import built_in
from torchtitan.config.errors import ConfigError
from torchtitan.models import registry
from torchtitan.models.family import ModelFamily
from torchtitan.models.llama3 import FAMILY
from torchtitan.models.registry import families, get_family, register_family


def problems_of(flavor: str, overrides: dict, vocab_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        FAMILY.resolve_args(flavor, overrides, vocab_size)
    return [str(problem) for problem in error.value.problems]


def test_overrides_win_over_the_flavor():
    args = FAMILY.resolve_args("8B", {"n_layers": 4, "rope_theta": 10_000})
    assert (args.n_layers, args.rope_theta, args.dim, args.vocab_size) == (4, 1e4, 4096, 128256)
    assert FAMILY.flavors["8B"].n_layers == 32


def test_the_feed_forward_follows_the_width_unless_set():
    widths = {name: args.ffn_hidden_dim for name, args in FAMILY.flavors.items()}
    assert widths == {
        "debugmodel": 768,
        "1B": 8192,
        "3B": 8192,
        "8B": 14336,
        "70B": 28672,
        "405B": 53248,
        "SmolLM2-135M": 1536,
        "SmolLM2-360M": 2560,
        "SmolLM2-1.7B": 8192,
    }
    assert FAMILY.resolve_args("debugmodel", {"dim": 512}).ffn_hidden_dim == 1536
    assert FAMILY.resolve_args("debugmodel", {"ffn_dim": 100}).ffn_hidden_dim == 100


def test_vocabulary_comes_from_the_tokenizer_where_the_flavor_has_none():
    assert FAMILY.resolve_args("debugmodel", {}).vocab_size is None
    assert FAMILY.resolve_args("debugmodel", {}, 264).vocab_size == 264
    assert FAMILY.resolve_args("debugmodel", {"vocab_size": 300}, 264).vocab_size == 300
    assert FAMILY.resolve_args("8B", {}, 264).vocab_size == 128256


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    [problem] = problems_of("debugmodel", {"vocab_size": 200}, 264)
    assert "model.args.vocab_size = 200: smaller than the tokenizer's 264 tokens" in problem
    assert "at least 264" in problem


def test_all_bad_overrides_are_named_at_once():
    problems = problems_of("debugmodel", {"n_layer": 3, "dim": "x", "n_layers": 0, "n_heads": True})
    assert len(problems) == 4
    text = "\n".join(problems)
    assert 'model.args.n_layer: is unknown. Fix: did you mean "n_layers"?' in text
    assert 'model.args.dim = "x": needs an integer' in text
    assert "model.args.n_layers = 0: must be more than 0" in text
    assert "model.args.n_heads = true: needs an integer" in text


def test_unknown_names_get_suggestions():
    assert problems_of("8b", {})[0].startswith(
        'model.flavor = "8b": unknown flavor of llama3. Fix: did you mean "8B"?'
    )
    with pytest.raises(ConfigError, match='did you mean "llama3"'):
        get_family("lama3")


def test_the_older_name_of_llama_3(monkeypatch):
    assert get_family("llama") is FAMILY
    monkeypatch.setattr(registry.MODELS, "_registered", dict(registry.MODELS._registered))
    mine = ModelFamily("llama", FAMILY.args_type, FAMILY.flavors, FAMILY.build)
    register_family(mine)
    assert get_family("llama") is mine


def test_families_can_be_added(monkeypatch):
    monkeypatch.setattr(registry.MODELS, "_registered", dict(registry.MODELS._registered))
    mine = ModelFamily("mine", FAMILY.args_type, FAMILY.flavors, FAMILY.build)
    register_family(mine)
    register_family(mine)  # a module imported twice
    assert get_family("mine") is mine and list(families()) == [*built_in(), "mine"]
    other = ModelFamily("llama3", FAMILY.args_type, {}, FAMILY.build)
    with pytest.raises(ValueError, match="'llama3' is registered already, by built in"):
        register_family(other)


def test_nothing_but_building_imports_torch():
    code = (
        "import sys\n"
        "from torchtitan.models.registry import families\n"
        "import torchtitan.preflight.model\n"
        "args = families()['llama3'].resolve_args('debugmodel', {}, 264)\n"
        "assert 'torch' not in sys.modules\n"
        "families()['llama3'].build(args)\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
