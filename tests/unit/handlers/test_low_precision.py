"""Handlers for low precision before anything runs: what they refuse, and what they convert."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.handlers.registry import LOW_PRECISION
from torchtitan.preflight import MODEL, preflight
from torchtitan.preflight import handlers as checks


def config_of(
    handlers: list[str], settings: dict[str, Any] | None = None, **sections: Any
) -> JobConfig:
    return JobConfig.model_validate(
        {"model": {"handlers": handlers}, "handlers": settings or {}, **sections}
    )


def problems(
    handlers: list[str],
    settings: dict[str, Any] | None = None,
    device: str = "cuda",
    world_size: int = 1,
    **sections: Any,
) -> list[str]:
    config = config_of(handlers, settings, **sections)
    return [str(problem) for problem in checks.check_static(RunContext(config, world_size, device))]


# what is refused


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_they_pass(name: str) -> None:
    assert problems([name]) == []
    assert problems([name, "compile"]) == []


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_without_torchao_one_sentence_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checks, "find_spec", lambda package: None if package == "torchao" else find_spec(package)
    )
    assert problems([name]) == [
        f'model.handlers = "{name}": it needs torchao, which is not installed.'
        " Fix: pip install -e '.[quant]' -c constraints.txt, in the clone."
    ]


LACKING = """
import sys
from importlib.util import find_spec
from torchtitan.preflight import handlers as checks
checks.find_spec = lambda name: None if name == "torchao" else find_spec(name)
from torchtitan.cli import main
for flags in ([], ["--check"], ["--comm.mode=fake_backend"]):
    assert main(["train", "--model.handlers", "float8", *flags]) == 2
    # The flags build the model, to find more problems.
    assert "torchao" not in sys.modules and (flags or "torch" not in sys.modules)
    print("END", file=sys.stderr)
"""


def test_it_is_told_before_torch_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LACKING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *told, rest = done.stderr.split("END\n")
    assert len(told) == 3 and rest == ""
    for text in told:
        assert text.count("torchao") == 1 and "'.[quant]'" in text


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_compile_comes_after(name: str) -> None:
    assert problems(["compile", name]) == [
        f'model.handlers = "compile": has to come after {name}. Fix: list {name} before compile.'
    ]


def test_a_model_has_one_format() -> None:
    for name in LOW_PRECISION:
        for other in set(LOW_PRECISION) - {name}:
            told = problems([name, other])
            assert any(f"cannot be combined with {other}" in text for text in told)


SENT = {"enable_fsdp_float8_all_gather": True}
PRECOMPUTED = {"precompute_float8_dynamic_scale_for_fsdp": True}
COPIES = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}


@pytest.mark.parametrize(
    ("name", "settings", "sections", "expected"),
    [
        ("float8", {"recipe_name": "rowwise", **SENT}, {}, "rowwise has one for each row"),
        ("float8", {"recipe_name": "rowwise_with_gw_hp", **SENT}, {}, "has one for each row"),
        ("float8", PRECOMPUTED, {}, "and none are"),
        ("float8", SENT, {"parallelism": COPIES}, "gather no weights"),
        (
            "float8",
            {**SENT, **PRECOMPUTED},
            {"training": {"enable_cpu_offload": True}},
            "lose their scales on the way to the device",
        ),
        (
            "float8",
            {"recipe_name": "rowwise_with_gw_hp", "filter_fqns": ["auto_filter_small_kn"]},
            {},
            "no figures for this recipe",
        ),
        ("float8", {"recipe_name": "columnwise"}, {}, "recipe_name"),
        (
            "float8",
            {},
            {"training": {"seq_len": 24, "local_batch_size": 1}},
            "1 x 24 tokens (context_parallel_degree = 1) has 24, and the kernels of the handler"
            " float8 need a multiple of 16",
        ),
        (
            "float8",
            {},
            {
                "training": {"seq_len": 48, "local_batch_size": 1},
                "parallelism": {"context_parallel_degree": 2},
            },
            "set it to a multiple of 32",
        ),
        ("mxfp8", {}, {"training": {"seq_len": 48, "local_batch_size": 1}}, "multiple of 32"),
        ("int8", {}, {"training": {"seq_len": 24, "local_batch_size": 1}}, "multiple of 16"),
        (
            "int8",
            {"output": False, "grad_input": False, "grad_weight": False},
            {},
            "all of its products are switched off",
        ),
        *(
            (
                "float8",
                {"recipe_name": recipe},
                {"training": {"mixed_precision_param": "float32"}},
                "come out in bfloat16",
            )
            for recipe in ("rowwise", "rowwise_with_gw_hp")
        ),
        *(
            (name, {}, {"training": {"mixed_precision_param": "float64"}}, "at most 32 bits")
            for name in LOW_PRECISION
        ),
    ],
)
def test_what_cannot_work_is_refused(
    name: str, settings: dict[str, Any], sections: dict[str, Any], expected: str
) -> None:
    [told] = problems([name], {name: settings}, world_size=2, **sections)
    assert expected in told


@pytest.mark.parametrize(
    ("settings", "sections"),
    [
        ({"recipe_name": "rowwise_with_gw_hp"}, {"seq_len": 24, "local_batch_size": 1}),
        ({"emulate": True}, {"seq_len": 24, "local_batch_size": 1}),
        ({"emulate": True}, {"mixed_precision_param": "float64"}),
        ({}, {"seq_len": 24, "local_batch_size": 2}),
    ],
)
def test_what_float8_can_do_is_not(settings: dict[str, Any], sections: dict[str, Any]) -> None:
    assert problems(["float8"], {"float8": settings}, training=sections) == []


def test_weights_that_move_lose_their_scale() -> None:
    """Why torchao's precomputed scales are refused with parameters in host memory."""
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    scale = torch.ones(())
    weight = WeightWithDynamicFloat8CastTensor(
        torch.ones(2, 2), LinearMMConfig(), torch.float8_e4m3fn, scale
    )
    assert weight.to("cpu")._precomputed_scale is scale
    assert weight.to("cpu", copy=True)._precomputed_scale is None


def test_copies_of_shards_may_be_sent_in_float8() -> None:
    copies = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
    assert problems(["float8"], {"float8": SENT}, world_size=4, parallelism=copies) == []


def test_a_pipeline_s_microbatches_count() -> None:
    training = {"seq_len": 24, "local_batch_size": 4}
    pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 1}
    [told] = problems(["float8"], world_size=2, training=training, parallelism=pipeline)
    assert "microbatch of 1 x 24 tokens" in told


def test_mxfp8_is_refused_on_cpus() -> None:
    [told] = problems(["mxfp8"], device="cpu")
    assert "needs the tensor cores of Blackwell GPUs, and this run is on CPUs" in told
    assert "mxfp8_emulated" in told
    assert problems(["mxfp8"], {"mxfp8": {"recipe_name": "mxfp8_emulated"}}, device="cpu") == []


@pytest.mark.parametrize(
    ("name", "settings", "capability", "is_refused"),
    [
        ("float8", {}, (8, 0), True),
        ("float8", {"emulate": True}, (8, 0), False),
        ("float8", {}, (8, 9), False),
        ("float8", {}, (9, 0), False),
        ("mxfp8", {}, (9, 0), True),
        ("mxfp8", {"recipe_name": "mxfp8_emulated"}, (9, 0), False),
        ("mxfp8", {}, (10, 0), False),
        ("mxfp8", {}, (12, 0), False),
        ("int8", {}, (8, 0), False),
        ("bitnet", {}, (8, 0), False),
    ],
)
def test_gpus_without_the_units_are_refused(
    name: str,
    settings: dict[str, Any],
    capability: tuple[int, int],
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda rank: capability)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    told = checks.check_environment(RunContext(config_of([name], {name: settings}), 1, "cuda"))
    assert bool(told) == is_refused
    if is_refused:
        number = ".".join(map(str, capability))
        assert f"the GPU has compute capability {number}, and it needs" in str(told[0])


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_filter_for_nothing_is_found_by_the_check(name: str) -> None:
    config = config_of([name], {name: {"filter_fqns": ["attention.wx", "output", "layer.0"]}})
    found = preflight(RunContext(config, 1, "cuda", full=False), [MODEL])
    assert [problem.value for problem in found] == ["attention.wx", "layer.0"]
    assert {problem.key for problem in found} == {f"handlers.{name}.filter_fqns"}
