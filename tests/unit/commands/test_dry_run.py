"""Figures of dry runs against arithmetic; and mistakes that they notice."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.tiny import SEQ_LEN, VOCAB_SIZE, Case
from torchtitan.cli import main
from torchtitan.commands import dry_run as module
from torchtitan.commands.dry_run import DryRun, dry_run
from torchtitan.commands.dry_run_report import report
from torchtitan.commands.traffic import Traffic
from torchtitan.config.run_context import RunContext
from torchtitan.models.llama3 import LlamaArgs
from torchtitan.models.registry import get_family
from torchtitan.parallel import tensor_parallel
from torchtitan.parallel.context import ring_attention
from torchtitan.weights.description import describe_model

F64 = 8  # bytes


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch: pytest.MonkeyPatch):
    """A prime, as in the tests of meshes, instead of the tokenizer's."""
    monkeypatch.setattr(module, "_vocab_size", lambda config: VOCAB_SIZE)


def facts_of(case: Case) -> RunContext:
    return RunContext(case.config(), case.world_size, "cpu", full=False)


def run(case: Case, rank: int = 0) -> DryRun:
    return dry_run(facts_of(case), rank)


def shapes(case: Case) -> dict[str, torch.Size]:
    args = get_family("llama3").resolve_args("debugmodel", case.config().model.args, VOCAB_SIZE)
    with torch.device("meta"):
        model = get_family("llama3").build(args)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "case", [Case(world_size=8, pp=2, tp=2), Case(world_size=4, cp=2), Case(world_size=3)]
)
def test_ranks_together_hold_every_element(case: Case):
    ranks = [run(case, rank) for rank in range(case.world_size)]
    sizes = {name: shape.numel() for name, shape in shapes(case).items()}
    copied = sum(size for name, size in sizes.items() if "norm" in name) * (case.tp - 1)
    assert {rank.total_parameters for rank in ranks} == {sum(sizes.values())}
    assert sum(rank.num_parameters for rank in ranks) == sum(sizes.values()) + copied
    for rank in ranks:
        assert rank.parameter_bytes == rank.gradient_bytes == F64 * rank.num_parameters
        steps = rank.optimizer_bytes - 2 * rank.parameter_bytes  # without the moments
        assert 0 < steps <= 4 * len(sizes)  # a float32 for each parameter of the rank


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "AdamW", "implementation": "for-loop"},
        {"name": "SGD", "args": {"momentum": 0.9}},
        {"name": "Adafactor"},
        {"name": "Muon"},
        {"name": "AdamWBF16"},
        {"name": "AdamW8bit", "args": {"block_size": 16}},
    ],
    ids=lambda optimizer: optimizer["name"],
)
def test_any_optimizer_steps(optimizer: dict[str, Any]):
    """Also one that asks for values, which fake tensors have not."""
    rank = run(Case(world_size=4, tp=2, settings={"optimizer": optimizer}), 1)
    ratios = {"SGD": 1, "Adafactor": 0.2, "Muon": 1.4, "AdamWBF16": 0.5, "AdamW8bit": 1.3}
    ratio = ratios.get(optimizer["name"], 2)
    assert rank.optimizer_bytes / rank.parameter_bytes == pytest.approx(ratio, rel=0.25)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWBF16"])
def test_steps_in_the_backward_of_compiled_blocks(name: str):
    case = Case(
        settings={
            "optimizer": {"name": name, "early_step_in_backward": True},
            "training": {"max_norm": float("inf")},
            "model": {"handlers": ["compile"]},
            "activation_checkpoint": {"mode": "full"},
        }
    )
    rank = run(case, 0)
    assert rank.gradient_bytes == 0
    assert rank.optimizer_bytes > 0


@pytest.mark.parametrize("handler", ["lora", "qlora"])
def test_what_adapters_train(handler: str):
    settings = {"model": {"handlers": [handler]}, "handlers": {handler: {"rank": 4}}}
    case = Case(settings=settings, args={"dim": 64, "ffn_dim": 128})
    result = run(case)
    linears = [s for name, s in shapes(case).items() if name[:6] == "layers" and len(s) == 2]
    base = sum(shape.numel() for shape in shapes(case).values())
    assert result.trained_parameters == 4 * sum(map(sum, linears))
    assert result.total_parameters == base + result.trained_parameters
    assert result.num_parameters == result.total_parameters
    assert result.gradient_bytes == F64 * result.trained_parameters
    adapted = sum(shape.numel() for shape in linears)
    quantised = adapted / 2 + F64 * adapted / 64 - F64 * adapted if handler == "qlora" else 0
    assert result.parameter_bytes == F64 * result.total_parameters + quantised
    total = f"{result.total_parameters:,}"
    assert f"trained     {result.trained_parameters:,} of {total} (" in report(
        result, facts_of(case)
    )


TEACHER = Path(__file__).parents[2] / "assets" / "teacher"


@pytest.mark.parametrize(
    ("loss", "share"),
    [
        ({"name": "dpo"}, 1),
        ({"name": "dpo", "args": {"variant": "simpo"}}, 0),
        ({"name": "distillation", "args": {"teacher_path": str(TEACHER)}}, None),
        ({"name": "distillation", "args": {"teacher_path": "not here"}}, 0),
    ],
    ids=["dpo", "simpo", "distillation", "no teacher"],
)
def test_the_frozen_model_is_counted(
    loss: dict[str, Any], share: int | None, caplog: pytest.LogCaptureFixture
):
    case = Case(world_size=2, settings={"loss": loss})
    result = run(case, 1)
    if share is None:
        args = describe_model(TEACHER).resolved()
        held = F64 * sum(args.model_copy(update={"vocab_size": VOCAB_SIZE}).modules().values()) / 2
        assert result.frozen_bytes == pytest.approx(held, rel=0.01)  # rows are cut unevenly
    else:
        assert result.frozen_bytes == share * result.parameter_bytes
    assert ("frozen model" in report(result, facts_of(case))) == bool(result.frozen_bytes)
    assert ("The frozen model is not counted" in caplog.text) == ("not here" in str(loss))


def test_the_base_below_adapters_is_no_copy():
    settings: dict[str, Any] = {"model": {"handlers": ["lora"]}, "loss": {"name": "dpo"}}
    assert run(Case(settings=settings)).frozen_bytes > 0
    settings["loss"]["args"] = {"reference": "base"}
    assert run(Case(settings=settings)).frozen_bytes == 0


def test_copies_hold_the_same():
    plain, copied = (run(Case(world_size=2 * n, replicate=n), 1) for n in (1, 2))
    assert plain.num_parameters == copied.num_parameters
    assert copied.coordinate["dp_shard"] == 1


def test_stages_are_those_of_the_pipeline_s_rank():
    case = Case(world_size=4, pp=2, layers=4, schedule="Interleaved1F1B")
    first, last = run(case, 0), run(case, 3)
    assert {name: sorted(modules) for name, modules in first.parts.items()} == {
        "stage 0 of 4": ["layers.0", "tok_embeddings"],
        "stage 2 of 4": ["layers.2"],
    }
    assert last.parts == {
        "stage 1 of 4": ["layers.1"],
        "stage 3 of 4": ["layers.3", "norm", "output"],
    }


def test_with_options_that_save_memory():
    settings = {
        "optimizer": {"early_step_in_backward": True},
        "training": {"enable_cpu_offload": True, "max_norm": float("inf")},
        "activation_checkpoint": {"offload": True},
    }
    plain, saving = (run(Case(world_size=4, tp=2, settings=chosen)) for chosen in ({}, settings))
    assert saving.gradient_bytes == 0 < plain.gradient_bytes  # after the backward
    assert saving.parameter_bytes == plain.parameter_bytes
    assert saving.optimizer_bytes == plain.optimizer_bytes


@pytest.mark.parametrize(("microbatches", "whole"), [(1, 0), (2, 1)])
def test_gradients_of_whole_layers_accumulate(microbatches: int, whole: int):
    result = run(Case(world_size=2, microbatches=microbatches))
    assert result.accumulated_bytes == whole * F64 * result.total_parameters
    assert result.num_microbatches == microbatches


def test_accumulated_gradients_are_cut_by_tensor_parallelism():
    result = run(Case(world_size=4, tp=2, microbatches=2))
    case = Case()
    sizes = {name: shape.numel() for name, shape in shapes(case).items()}
    held = sum(size if "norm" in name else size / 2 for name, size in sizes.items())
    # Of the rows of an odd vocabulary the first rank has one more, in the embedding and the head.
    assert result.accumulated_bytes == F64 * (held + 2 * 32 / 2)


def test_traffic_of_data_parallelism():
    case = Case(world_size=4, settings={"parallelism": {"fsdp_reshard_after_forward": "never"}})
    padded = sum(math.ceil(s[0] / 4) * 4 * math.prod(s[1:]) for s in shapes(case).values())
    traffic = run(case).traffic
    units = 2 + case.layers + 1  # both ends, the blocks, and what is left: the norm
    for collective in ("all-gather", "reduce-scatter"):
        assert traffic.calls["dp_shard", collective] == units
        assert traffic.num_bytes["dp_shard", collective] == F64 * padded


@pytest.mark.parametrize("collective", ["all-gather", "reduce-scatter"])
def test_traffic_of_tensor_parallelism(collective: str):
    case = Case(world_size=2, tp=2)
    traffic = run(case).traffic
    sequences = case.config().training.local_batch_size
    count = 2 * (2 * case.layers + 1)  # two in a block, one at either end; as many in the backward
    num_bytes = count * sequences * SEQ_LEN * 32 * F64
    if collective == "all-gather":  # two numbers a token and rank in each chunk of the loss
        count += case.config().training.loss_chunks
        num_bytes += 2 * case.tp * sequences * SEQ_LEN * F64
    assert traffic.calls["tp", collective] == count
    assert traffic.num_bytes["tp", collective] == num_bytes


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # keys and values in the forward and again in the backward, their gradients once
        ("allgather", {"all-gather": 4, "reduce-scatter": 2}),
        # the same on one way to the other rank; gradients go home from it
        ("ring", {"send": 2 + 2 + 4}),
        # queries, keys, values, output; and their gradients
        ("ulysses", {"all-to-all": 8}),
    ],
)
@pytest.mark.parametrize("handlers", [[], ["compile"]])
def test_traffic_of_context_parallelism(
    method: str, expected: dict[str, int], handlers: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Compiled blocks share their graphs, which run once each and count for all blocks."""
    trace, traced = Traffic._trace, list[Any]()

    def counted(self: Traffic, func: Any, args: tuple[Any, ...]) -> Any:
        traced.append(func)
        return trace(self, func, args)

    monkeypatch.setattr(Traffic, "_trace", counted)
    parallelism = {"context_parallel_method": method}
    case = Case(world_size=4, cp=2, settings={"parallelism": parallelism})
    context = facts_of(case)
    model = context.config.model.model_copy(update={"handlers": tuple(handlers)})
    config = context.config.model_copy(update={"model": model})
    traffic = dry_run(dataclasses.replace(context, config=config), 0).traffic
    found = {kind: calls for (axis, kind), calls in traffic.calls.items() if axis == "cp"}
    assert found == {kind: calls * case.layers for kind, calls in expected.items()}
    assert not traffic.unknown
    if method != "ulysses":  # the exchanges of the others are one operator
        assert len(traced) == 2 * (1 if handlers else case.layers)


def test_exchanges_that_depend_on_documents_are_named():
    traffic = run(Case(world_size=4, cp=2, document_mask=True)).traffic
    assert not [axis for axis, _ in traffic.calls if axis == "cp"]
    assert "torchtitan::context_parallel_attention" in traffic.unknown


@pytest.mark.parametrize("handlers", [(), ("compile",)])
def test_packed_documents_without_context_parallelism_exchange_nothing(handlers: tuple[str, ...]):
    """Their borders depend on the data, which are not there."""
    context = facts_of(Case(world_size=2, document_mask=True))
    model = context.config.model.model_copy(update={"handlers": handlers})
    config = context.config.model_copy(update={"model": model})
    traffic = dry_run(dataclasses.replace(context, config=config), 0).traffic
    assert {axis for axis, _ in traffic.calls} == {"dp_shard"}
    assert not traffic.unknown


def not_scattered(self: nn.Module, *args: object, **kwargs: object) -> object:
    return super(tensor_parallel._ScatterOutput, self).forward(*args, **kwargs)


MISTAKES = {
    "a sum over ranks is left out": (
        Case(world_size=2, tp=2),
        (tensor_parallel._ScatterOutput, "forward", not_scattered),
    ),
    "a stage expects other hidden states": (
        Case(world_size=2, pp=2),
        (LlamaArgs, "hidden_size", lambda self: 2 * self.dim),
    ),
    "gradients of keys are not cut": (
        Case(world_size=2, cp=2),
        (ring_attention._AllGather, "_sum", lambda self, whole: whole),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    case, patch = MISTAKES[name]
    run(case)
    monkeypatch.setattr(*patch)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        run(case)
    assert not torch.distributed.is_initialized()


def test_the_log_of_the_rank_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A dry run builds the model, which a check does not, so it can print it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    logger = logging.getLogger("torchtitan")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    words = ["--training.dataset=stdlib", "--training.seq_len=32", "--model.args.n_layers=1"]
    words += ["--comm.mode=fake_backend", "--model.print_after_conversion"]
    assert main(["train", *words]) == 0
    printed = capsys.readouterr()
    assert "runs on rank 1" in printed.out
    assert printed.err.count("(feed_forward): FeedForward(") == 1


def test_report():
    case = Case(world_size=8, pp=2, tp=2, microbatches=2)
    text = report(run(case, 7), facts_of(case))
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["processes", "8: pp 2, dp_shard 2, tp 2"] in lines
    assert ["rank", "7: pp 1, dp_shard 1, tp 1"] in lines
    assert ["holds", "stage 1 of 2: layers.1, norm, output"] in lines
    assert [
        "step",
        "8 sequences x 32 = 256 tokens a step, 4 microbatches of 1 a rank, of which 1 ran",
    ] in lines
    assert any(line[0] == "memory" and "not yet reduced" in line[1] for line in lines)
    assert any(line[0] == "traffic" and "reduce-scatter" in line[1] for line in lines)
