"""The decoder: what attends to what, number formats, compilation, and how Llama declares it."""

import math

import pytest
import torch

from torchtitan.models.decoder.model import Block, Decoder, apply_rope, rope_rotations
from torchtitan.models.llama3 import FAMILY, LlamaArgs
from torchtitan.models.spec import InitRule, LanguageModel, WrapUnit
from torchtitan.parallel.initialize import initialize_parameters

SMALL = LlamaArgs(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48)
TIED = SMALL.model_copy(update={"tied_embeddings": True})


def build(args: LlamaArgs = SMALL, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(args).to(dtype)
    # Larger than training starts from, so that attention is sharp and what it sees matters.
    initialize_parameters(model, lambda name: InitRule("normal", std=0.3), seed=3)
    return model


def tokens_and_positions(length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(length).expand(2, -1)


def on_meta(args: LlamaArgs) -> Decoder:
    with torch.device("meta"):
        return Decoder(args)


def test_parameters_are_named_as_in_metas_checkpoints() -> None:
    """So that `torchtitan convert dcp-to-torch` is enough for torchtune and others."""
    outside = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    block = (
        *("attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "ffn_norm"),
    )
    inside = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in block}
    assert set(on_meta(SMALL).state_dict()) == outside | inside


def test_a_token_changes_nothing_before_it():
    model = build()
    tokens, positions = tokens_and_positions()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = model(tokens, positions), model(changed, positions)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_packed_documents_do_not_see_each_other():
    model = build(dtype=torch.float64)
    tokens, _ = tokens_and_positions(12)
    ids = torch.tensor([[0] * 5 + [1] * 7, [4] * 5 + [4] * 7])
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    packed = model(tokens, positions, ids)
    first = model(tokens[:1, :5], positions[:1, :5])
    second = model(tokens[:1, 5:], positions[:1, 5:])
    whole = model(tokens[1:], positions[1:])
    torch.testing.assert_close(packed[:1], torch.cat([first, second], 1), rtol=0, atol=1e-13)
    torch.testing.assert_close(packed[1:], whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ids", [None, torch.tensor([[0] * 5 + [1] * 7, [4] * 12])])
def test_what_is_farther_than_the_window_changes_nothing(ids):
    """In two layers a token hears of what is up to twice the window's reach before it."""
    tokens, positions = tokens_and_positions(12)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    for window in (1, 3):
        model = build(SMALL.model_copy(update={"sliding_window": window}), torch.float64)
        before, after = model(tokens, positions, ids), model(changed, positions, ids)
        reached = (before != after).any(-1).nonzero()[:, 1]
        assert reached.unique().tolist() == [*range(5, min(12, 5 + 2 * (window - 1) + 1))]


def test_a_window_of_the_whole_sequence_is_none():
    tokens, positions = tokens_and_positions(12)
    plain = build(dtype=torch.float64)(tokens, positions)
    for window in (12, 13):
        model = build(SMALL.model_copy(update={"sliding_window": window}), torch.float64)
        assert torch.equal(model(tokens, positions), plain)
    model = build(SMALL.model_copy(update={"sliding_window": 11}), torch.float64)
    narrow = model(tokens, positions)
    torch.testing.assert_close(narrow[:, :11], plain[:, :11], rtol=0, atol=1e-13)
    assert (narrow[:, 11] - plain[:, 11]).abs().max() > 1e-6


def test_only_differences_of_positions_matter():
    model = build(dtype=torch.float64)
    tokens, positions = tokens_and_positions()
    moved = model(tokens, positions + 1000)
    torch.testing.assert_close(moved, model(tokens, positions), rtol=0, atol=1e-10)
    assert (model(tokens, positions * 3) - moved).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "rotations"),
    [
        (torch.float32, torch.complex64),
        (torch.bfloat16, torch.complex64),
        (torch.float64, torch.complex128),
    ],
)
def test_number_formats(dtype, rotations):
    tokens, positions = tokens_and_positions()
    model, seen = build(dtype=dtype), []
    model.layers["0"].register_forward_pre_hook(lambda _, args: seen.append(args[1].dtype))
    hidden = model(tokens, positions)
    assert (hidden.dtype, model.head(hidden).dtype, seen) == (dtype, dtype, [rotations])


def test_rope_turns_bfloat16_in_float32():
    args = LlamaArgs(dim=64, n_heads=1)
    x = torch.randn(1, 2, 1, 64).bfloat16()
    rotations = rope_rotations(torch.tensor([[0, 99_999]]), args, torch.float32)
    exact = rope_rotations(torch.tensor([[0, 99_999]]), args, torch.float64)
    turned = apply_rope(x, rotations)
    assert torch.equal(turned[:, 0], x[:, 0])
    error = turned.double() - apply_rope(x.double(), exact)
    assert error.abs().max() < x.abs().max() * (2**-8 + 0.01)  # rounding; the angle's own error


def test_rope_scaling_stretches_long_wavelengths_only():
    args = LlamaArgs(dim=128, n_heads=1, rope_scaling_factor=8.0)
    plain = args.model_copy(update={"rope_scaling_factor": 1.0})
    one = torch.tensor([[1]])
    angles = rope_rotations(one, args, torch.float64).angle().flatten()
    unscaled = rope_rotations(one, plain, torch.float64).angle().flatten()
    wavelengths = 2 * math.pi / unscaled
    ratio = unscaled / angles
    torch.testing.assert_close(ratio[wavelengths < 8192 / 4], torch.ones(1).double().expand(29))
    torch.testing.assert_close(ratio[wavelengths > 8192], torch.full((29,), 8.0).double())
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert ((between > 1) & (between < 8)).all() and len(between) == 64 - 58


def test_yarn_stretches_long_wavelengths_and_sharpens_attention():
    sizes = {"dim": 128, "n_heads": 1, "rope_theta": 1e4}
    args = LlamaArgs(**sizes, rope_scaling_type="yarn", rope_scaling_factor=4.0)
    one = torch.tensor([[1]])
    scaled = rope_rotations(one, args, torch.float64).flatten()
    plain = rope_rotations(one, LlamaArgs(**sizes), torch.float64).flatten()
    ratio, turns = plain.angle() / scaled.angle(), 8192 * plain.angle() / (2 * math.pi)
    torch.testing.assert_close(ratio[turns > 33], torch.ones(1).double().expand(26))
    torch.testing.assert_close(ratio[turns < 1], torch.full((14,), 4.0).double())
    assert (ratio.diff() >= -1e-12).all()
    length = 0.1 * math.log(4) + 1
    torch.testing.assert_close(scaled.abs(), torch.full((64,), length).double())


class ParallelBlock(Block):
    def forward(self, x, rotations, mask):
        attended = self.attention(self.attention_norm(x), rotations, mask)
        return x + attended + self.feed_forward(self.ffn_norm(x))


class ParallelDecoder(Decoder):
    block_type = ParallelBlock


def test_another_block():
    """The example of docs/guides/own_model.md."""
    model, plain = ParallelDecoder(SMALL).double(), build(dtype=torch.float64)
    model.load_state_dict(plain.state_dict())
    tokens, positions = tokens_and_positions()
    found = model(tokens, positions)
    x = plain.tok_embeddings(tokens)
    rotations = rope_rotations(positions, SMALL, torch.float64)
    for block in plain.layers.values():
        attended = block.attention(block.attention_norm(x), rotations, None)
        x = x + attended + block.feed_forward(block.ffn_norm(x))
    torch.testing.assert_close(found, plain.norm(x))
    assert (found - plain(tokens, positions)).abs().max() > 1e-3


def test_normalised_heads_do_not_see_the_scale_of_the_projections():
    args = SMALL.model_copy(update={"qk_norm": True, "head_dim": 6})
    model = build(args, torch.float64)
    tokens, positions = tokens_and_positions()
    for block in model.layers.values():
        block.attention.q_norm.eps = block.attention.k_norm.eps = 0.0
    before = model(tokens, positions)
    for block in model.layers.values():
        block.attention.wq.weight.data *= 3
        block.attention.wk.weight.data *= 5
    torch.testing.assert_close(model(tokens, positions), before)


def test_head_lends_its_weight():
    model = build()
    hidden = torch.randn(2, 3, 32)
    taken = model.head(hidden, lambda given, weight: (given, weight))
    assert taken[0] is hidden and taken[1] is model.output.weight
    torch.testing.assert_close(model.head(hidden), hidden @ model.output.weight.t())


def test_tied_embeddings_are_one_parameter():
    model = build(TIED)
    assert model.head.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())
    allocated = on_meta(TIED).to_empty(device="cpu")
    assert allocated.head.weight is allocated.tok_embeddings.weight


@pytest.mark.parametrize("args", [SMALL, TIED], ids=["untied", "tied"])
def test_wrap_units_hold_what_serves_once_in_a_forward(args):
    model = on_meta(args)
    units = model.wrap_units()
    held = [name for name, p in model.named_parameters() for unit in units if has(unit, p)]
    assert len(held) == len(set(held))
    left_over = dict(model.named_parameters()).keys() - set(held)
    tied = {"tok_embeddings.weight"} if args.tied_embeddings else set()
    assert left_over == {"norm.weight"} | tied
    ends = ([], []) if args.tied_embeddings else (["embeddings"], ["head"])
    assert [unit.name for unit in units] == [*ends[0], "layers.0", "layers.1", *ends[1]]


def has(unit: WrapUnit, parameter: torch.nn.Parameter) -> bool:
    return any(parameter is held for module in unit.modules for held in module.parameters())


def test_declarations():
    model = on_meta(SMALL)
    assert isinstance(model, LanguageModel)
    assert model.blocks() == {"layers.0": model.layers["0"], "layers.1": model.layers["1"]}
    rules = {name: model.init_rule(name) for name, _ in model.named_parameters()}
    assert rules["tok_embeddings.weight"].std == 1.0
    assert rules["layers.0.attention.wq.weight"].std == 0.02
    assert rules["layers.0.attention.wo.weight"].std == pytest.approx(0.02 / math.sqrt(2))
    assert rules["layers.1.feed_forward.w2.weight"].std == pytest.approx(0.02 / 2)
    assert rules["output.weight"].std == pytest.approx(32**-0.5 / 4)
    assert on_meta(TIED).init_rule("tok_embeddings.weight").std == pytest.approx(32**-0.5 / 4)
    norms = [name for name, rule in rules.items() if rule.kind == "constant"]
    assert len(norms) == 2 * 2 + 1 and all(rules[name].value == 1.0 for name in norms)


@pytest.mark.parametrize(
    "name", ["layers.0.attention.wq.bias", "layers.0.attention.wq.lora_b", "gain", "layers.0.scale"]
)
def test_it_does_not_guess_how_a_strange_parameter_starts(name: str):
    with pytest.raises(LookupError, match=f"how {name} starts.*subclass of the model or in a ha"):
        on_meta(SMALL).init_rule(name)


def test_the_first_loss_is_that_of_guessing():
    args = FAMILY.resolve_args("debugmodel", {}, vocab_size=264)
    model = Decoder(args)
    initialize_parameters(model, model.init_rule, seed=0)
    tokens = torch.randint(264, (2, 257), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.head(model(tokens[:, :-1], torch.arange(256).expand(2, -1)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(264) + 0.03, abs=0.02)


def test_flops_per_token():
    """Counted by hand: 6 per weight of a product, 12 * layers * dim * length of attention."""
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    products = 6 * (2 * block + 32 + 50 * 32)
    for args in (SMALL, TIED):
        model = on_meta(args)
        assert model.flops_per_token(100, causal=False) == products + 12 * 2 * 32 * 100
        assert model.flops_per_token(100, causal=True) == products + 12 * 2 * 32 * 50


def test_flops_of_a_window():
    """Query i of T sees min(i + 1, W) keys; the formula takes half of the last one off, as it does
    without a window."""
    model = on_meta(SMALL.model_copy(update={"sliding_window": 30}))
    of_key = 12 * 2 * 32
    weights = model.flops_per_token(1, causal=False) - of_key
    seen = sum(min(i + 0.5, 30) for i in range(100)) / 100
    assert model.flops_per_token(100, causal=False) == weights + of_key * 30
    assert model.flops_per_token(100, causal=True) == pytest.approx(weights + of_key * seen)
    assert model.flops_per_token(20, causal=True) == weights + of_key * 10


def test_blocks_compile_without_breaks():
    """`aot_eager` traces forward and backward like the real compiler, without generating code."""
    tokens, positions = tokens_and_positions()
    ids = positions // 5
    eager, compiled = build(dtype=torch.float64), build(dtype=torch.float64)
    for block in compiled.blocks().values():
        block.compile(backend="aot_eager", fullgraph=True)
    for arguments in ((tokens, positions), (tokens, positions, ids)):
        outs = [model(*arguments) for model in (eager, compiled)]
        torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)
        upstream = torch.randn_like(outs[0])
        for out in outs:
            out.backward(upstream)
    for ours, reference in zip(compiled.parameters(), eager.parameters()):
        if reference.grad is not None:  # the head is not part of the forward
            torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=1e-11)


def test_the_embedding_sums_wide_in_narrow_models():
    """Else the gradient of a common token would depend on how many tokens a microbatch has."""
    model = build(dtype=torch.bfloat16)
    outputs = []
    model.tok_embeddings.register_forward_hook(lambda *args: outputs.append(args[2]))
    tokens, positions = torch.full((8, 256), 7), torch.arange(256).expand(8, -1)
    hidden = model(tokens, positions)
    outputs[0].retain_grad()
    hidden.sum().backward()
    exact = outputs[0].grad.double().sum((0, 1))
    found = model.tok_embeddings.weight.grad[7].double()
    assert (found - exact).abs().max() < 2**-8 * exact.abs().max()
