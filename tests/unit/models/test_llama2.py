"""Llama 2: the published sizes, on Llama 3's model."""

import pytest
import torch

from torchtitan.models.llama2 import FAMILY, FLAVORS
from torchtitan.models.llama3.model import Llama

PUBLISHED = {  # parameters, feed-forward, heads of queries and of keys
    "7B": (6_738_415_616, 11008, (32, 32)),
    "13B": (13_015_864_320, 13824, (40, 40)),
    "70B": (68_976_648_192, 28672, (64, 8)),
}


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_flavors_are_the_published_ones(flavor):
    args = FLAVORS[flavor]
    with torch.device("meta"):
        model = FAMILY.build(args)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert (number, args.ffn_hidden_dim, args.heads()) == PUBLISHED[flavor]
    assert sum(args.modules().values()) == number
    assert args.vocab_size == 32000 and args.head_dim == 128


@pytest.mark.parametrize("args", FLAVORS.values(), ids=FLAVORS)
def test_what_all_sizes_have(args):
    assert (args.rope_theta, args.rope_scaling_factor, args.norm_eps) == (10000.0, 1.0, 1e-5)
    assert args.max_seq_len == 4096 and not args.tied_embeddings


def test_the_debug_model_has_all_its_key_heads():
    args = FAMILY.resolve_args("debugmodel", {}, vocab_size=300)
    assert args.heads() == (8, 8) and args.vocab_size == 300
    with torch.device("meta"):
        assert isinstance(FAMILY.build(args), Llama)
