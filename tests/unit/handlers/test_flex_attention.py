"""The handler `flex_attention`: what it refuses, and the masks that it makes.

Its kernel is for CUDA (`tests/gpu`). Here the masks are tensors, as in a dry run, so that what it
does to a model is seen on every mesh.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.tiny import Case, compare, train
from tests.parity.table import TOLERANCE, ULYSSES, row
from tests.pool import GlooPool
from torchtitan.cli import main
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers import settings as handler_settings
from torchtitan.handlers.flex_attention import FlexAttentionHandler, FlexMasks
from torchtitan.handlers.masks import MASKS, MaskEntry, entry_of, register_mask
from torchtitan.models import attention, registry
from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention
from torchtitan.models.family import ModelFamily
from torchtitan.models.masks import MaskFunction, MaskInputs, default_mask, dense
from torchtitan.models.spec import ModelArgs
from torchtitan.preflight import handlers as checks
from torchtitan.preflight.model import build_on_meta

CPU = torch.device("cpu")
IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 7]])


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MASKS, "_registered", dict(MASKS._registered))


def config_of(
    masks: tuple[str, ...] = (),
    window: int | None = None,
    of_model: int | None = None,
    documents: bool = False,
    **sections: Any,
) -> JobConfig:
    model = {"handlers": ["flex_attention"], "args": {"n_layers": 2, "vocab_size": 64}}
    if of_model is not None:
        model["args"]["sliding_window"] = of_model  # type: ignore[index]
    training = {"document_mask": documents, "seq_len": 64, **sections.pop("training", {})}
    handlers = {"flex_attention": {"masks": list(masks), "window": window}}
    sections = {"model": model, "handlers": handlers, "training": training, **sections}
    return JobConfig.model_validate(sections)


def problems(device: str = "cuda", world_size: int = 1, **settings: Any) -> list[str]:
    return [
        str(p) for p in checks.check_static(RunContext(config_of(**settings), world_size, device))
    ]


# what is refused


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"documents": True},
        {"window": 16},
        {"of_model": 16},
        {"of_model": 16, "window": 16, "documents": True},
        {"masks": ("causal",)},
        {"masks": ("document", "sliding_window"), "documents": True, "of_model": 16},
        {"masks": ("causal", "sliding_window"), "window": 16},
    ],
)
def test_what_fits(settings: dict[str, Any]) -> None:
    assert problems(**settings) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"masks": ("sliding_windw",)}, 'is not a mask. Fix: did you mean "sliding_window"?'),
        ({"masks": ("causal", "causal")}, "is listed twice"),
        ({"masks": ("document",)}, "needs training.document_mask = true"),
        ({"masks": ("causal",), "documents": True}, "asks for document, which is not listed"),
        ({"masks": ("sliding_window",)}, "the size of the window is not set"),
        (
            {"masks": ("causal",), "window": 16},
            "flex_attention.window = 16 asks for sliding_window",
        ),
        ({"masks": ("causal",), "of_model": 16}, "model.args.sliding_window = 16 asks for"),
        ({"window": 16, "of_model": 8}, "window = 16: the model's own window is 8"),
        ({"window": 0}, "handlers.flex_attention.window = 0"),
        (
            {"training": {"mixed_precision_param": "float64", "dtype": "float64"}},
            "training.mixed_precision_param",
        ),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], expected: str) -> None:
    [text] = problems(**settings)
    assert expected in text and "Fix: " in text


def test_on_cpus_the_reason_and_the_way_out() -> None:
    [text] = problems("cpu")
    assert text.startswith('model.handlers = "flex_attention": FlexAttention trains on CUDA')
    assert "no backward of it for CPUs, and this run is on cpu. Fix: leave it out" in text
    assert "model.args.sliding_window" in text


@pytest.mark.parametrize(("method", "count"), [("allgather", 1), ("ring", 1), ("ulysses", 0)])
def test_context_parallelism_by_ulysses_only(method: str, count: int) -> None:
    mesh = {"context_parallel_degree": 2, "context_parallel_method": method}
    found = problems(world_size=2, parallelism=mesh)
    assert len(found) == count
    for text in found:
        assert f'context_parallel_method = "{method}"' in text
        assert "no rank sees whole sequences" in text and "set it to ulysses" in text


def test_heads_that_are_too_small_for_the_kernel() -> None:
    """The debug model is 256 wide."""
    config = config_of()
    for heads, count in ((16, 0), (32, 1)):
        args = {**config.model.args, "n_heads": heads}
        model = config.model.model_copy(update={"args": args})
        context = RunContext(config.model_copy(update={"model": model}), 1, "cuda")
        found = checks.check_static(context)
        assert len(found) == count
        assert all("heads of at least 16 channels, not 8" in str(problem) for problem in found)


def test_a_machine_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_settings, "_needs_capability", lambda *_: ())
    for found, count in (("a spec", 0), (None, 1)):
        monkeypatch.setattr(handler_settings, "find_spec", lambda _, found=found: found)
        told = checks.check_environment(RunContext(config_of(), 1, "cuda"))
        assert [problem.value for problem in told] == ["flex_attention"] * count


def test_a_model_that_attends_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    family = ModelFamily("own", ModelArgs, {"small": ModelArgs()}, lambda _: torch.nn.Linear(2, 2))
    monkeypatch.setattr(
        registry.MODELS, "_registered", {**registry.MODELS._registered, "own": (family, "a test")}
    )
    config = JobConfig.model_validate(
        {"model": {"name": "own", "flavor": "small", "handlers": ["flex_attention"]}}
    )
    context = RunContext(config, 1, "cuda")
    [problem] = checks.check_model(context, build_on_meta(context))
    assert "does not use the attention of torchtitan.models.attention" in str(problem)
    context = RunContext(config_of(), 1, "cuda")
    assert checks.check_model(context, build_on_meta(context)) == []


def test_nothing_of_it_needs_torch_to_be_refused() -> None:
    code = (
        "import sys\n"
        "from torchtitan.cli import main\n"
        "status = main(['train', '--model.handlers=flex_attention', '--job.device=cpu'])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "FlexAttention trains on CUDA only" in done.stderr


# the masks


def masks_of(config: JobConfig) -> FlexMasks:
    """What the handler puts into the model."""
    family = registry.get_family("llama3")
    with torch.device("meta"):
        model = family.build(family.resolve(config.model))
    dims = ParallelDims.from_section(config.parallelism, 1)
    FlexAttentionHandler(config, dims).convert(model)
    assert isinstance(model.masks, FlexMasks)
    assert model.flops_per_token(64, True) <= model.flops_per_token(64, False)  # type: ignore[operator]
    return model.masks


def seen(masks: FlexMasks, ids: torch.Tensor | None) -> torch.Tensor:
    """`[B, T, T]`, for the sequence of `IDS`."""
    return masks.build(ids, 8, CPU).squeeze(1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"documents": True},
        {"window": 3},
        {"of_model": 3, "documents": True},
        {"masks": ("sliding_window", "document"), "window": 1, "documents": True},
        {"window": 100},
    ],
)
def test_they_are_those_that_attention_has_without_it(settings: dict[str, Any]) -> None:
    window = settings.get("window", settings.get("of_model"))
    ids = IDS if settings.get("documents") else None
    inputs = MaskInputs(8, ids, window)
    expected = dense(default_mask(inputs), inputs, CPU)
    assert torch.equal(seen(masks_of(config_of(**settings)), ids), expected.squeeze(1))


def test_the_cost_of_a_token_is_that_of_the_window() -> None:
    family = registry.get_family("llama3")
    counted = []
    for config in (config_of(window=4), config_of(of_model=4), config_of()):
        with torch.device("meta"):
            model = family.build(family.resolve(config.model))
        dims = ParallelDims.from_section(config.parallelism, 1)
        FlexAttentionHandler(config, dims).convert(model)
        counted.append(model.flops_per_token(64, causal=True))  # type: ignore[operator]
    assert counted[0] == counted[1] < counted[2]


def even_keys(inputs: MaskInputs) -> MaskFunction:
    """Every second key.

    More of it."""
    return lambda batch, query, key: key % 2 == 0


def test_a_registered_mask(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'did you mean "even_keys"' not in problems(masks=("even_keys",))[0]
    register_mask("even_keys")(even_keys)
    assert problems(masks=("even_keys",)) == []
    assert MASKS.origin("even_keys") == __name__
    found = seen(masks_of(config_of(("even_keys", "document"), documents=True)), IDS)
    places = torch.arange(8)
    even = (places % 2 == 0) | (places.unsqueeze(1) == places)  # and itself
    inputs = MaskInputs(8, IDS, None)
    assert torch.equal(found, dense(default_mask(inputs), inputs, CPU).squeeze(1) & even)
    assert main(["list", "masks"]) == 0
    assert f"Every second key. (from {__name__})" in capsys.readouterr().out


def test_it_shows_nothing_of_the_future() -> None:
    register_mask("everything")(lambda inputs: lambda batch, query, key: key == key)
    found = seen(masks_of(config_of(("everything",))), None)
    assert torch.equal(found, torch.ones(1, 8, 8, dtype=torch.bool).tril())


@pytest.mark.parametrize("thing", ["words", AttentionMaskBuilder, 3])
def test_what_is_no_mask(thing: Any) -> None:
    with pytest.raises(TypeError, match="neither a function nor a MaskEntry"):
        entry_of("odd", thing)
    with pytest.raises(ValueError, match="registered already, by built in"):
        register_mask("causal")(even_keys)
    entry = MaskEntry(lambda: even_keys)
    assert entry_of("other", entry) is entry


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("ids", [None, IDS])
def test_blocks_of_the_kernel_are_of_the_same_masks(
    ids: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention uncompiled, which runs anywhere, against the mask as a tensor."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(attention, "_compile_once", lambda name: getattr(flex_attention, name))
    register_mask("even_keys")(even_keys)
    names = ("even_keys", "sliding_window", *["document"] * (ids is not None))
    masks = masks_of(config_of(names, window=5, documents=ids is not None))
    q, k, v = (torch.randn(2, heads, 8, 16) for heads in (4, 2, 2))
    expected = InnerAttention()(q, k, v, masks.build(ids, 8, CPU))
    as_blocks: Callable[..., Any] = attention.block_mask
    with pytest.MonkeyPatch.context() as patch:
        module = "torchtitan.models.attention.dense"
        patch.setattr(module, as_blocks)
        mask = masks.build(ids, 8, CPU)
    assert isinstance(mask, flex_attention.BlockMask)
    out = InnerAttention()(q, k, v, mask)
    torch.testing.assert_close(out, expected)


# in a model, on meshes

FLEX = {
    "model": {"handlers": ["flex_attention"]},
    "handlers": {"flex_attention": {"masks": ["sliding_window", "document"], "window": 5}},
}
WHERE = {
    "one process": row(FLEX, document_mask=True),
    "fsdp": row(FLEX, shard=2, document_mask=True),
    "tp": row(FLEX, tp=2, document_mask=True),
    "ulysses": row(FLEX, ULYSSES, cp=2, document_mask=True),
    "pp": row(FLEX, pp=2, schedule="1F1B", document_mask=True),
}


@pytest.mark.parametrize("case", WHERE.values(), ids=WHERE)
def test_it_trains_as_the_models_own_window(case: Case, gloo_pool: GlooPool) -> None:
    [expected] = gloo_pool.run(1, train, Case(document_mask=True, window=5))
    found = gloo_pool.run(case.world_size, train, case)
    assert compare(found, expected).worst < TOLERANCE
    [other] = gloo_pool.run(1, train, replace(Case(), document_mask=True))
    assert compare(found, other).worst > 1e-4
