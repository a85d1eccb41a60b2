"""Checkpoints of adapters hold what is trained, refer to the base, and move between meshes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.adapted_runs import Leg, on, write_base
from tests.distributed.tiny import Case
from tests.parity.adapted import ADAPTED, kind_of
from tests.parity.table import row
from tests.pool import GlooPool
from torchtitan.checkpoint.manifest import BASE_STATE, read_manifest
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import MODEL, preflight

ONE, FSDP_TP = ADAPTED[0], ADAPTED[9]
DROPPED = {"handlers": ONE.settings["handlers"], "model": {"handlers": ["lora"]}}
QUERIES: dict[str, dict[str, Any]] = {
    "model": {"handlers": ["lora"]},
    "handlers": {"lora": {"dora": True, "targets": ["wq"]}},
}
PIPELINE = row(DROPPED, pp=2, schedule="1F1B")
TENSOR = row(DROPPED, tp=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny model."""
    return write_base(tmp_path_factory.mktemp("base") / "hf", ONE)


@pytest.fixture(scope="module")
def alone(gloo_pool: GlooPool, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process that is not interrupted."""
    [leg] = on(gloo_pool, ONE, tmp_path_factory.mktemp("alone"), base, 6)
    return leg.losses


def whole(legs: list[Leg], name: str) -> dict[str, str]:
    tensors: dict[str, str] = {}
    for leg in legs:
        tensors |= getattr(leg, name)
    return tensors


@pytest.mark.fault("F53")
def test_a_run_moves_over_meshes(
    gloo_pool: GlooPool, base: Path, alone: list[float], tmp_path: Path
) -> None:
    losses, before = [], None
    for case, last in ((TENSOR, 2), (PIPELINE, 4), (FSDP_TP, 6)):
        legs = on(gloo_pool, case, tmp_path, base, last)
        losses += legs[0].losses
        assert before is None or whole(legs, "loaded") == before
        before = whole(legs, "content")
    # The last mesh attends within documents, as the others do not.
    assert losses[:4] == pytest.approx(alone[:4], rel=1e-10)
    assert kind_of(ONE) == kind_of(FSDP_TP)


def test_a_checkpoint_holds_what_is_trained(
    gloo_pool: GlooPool, base: Path, tmp_path: Path
) -> None:
    on(gloo_pool, TENSOR, tmp_path, base, 1)
    manifest = read_manifest(tmp_path / "step-1")
    names = {name.split(".")[-1] for name in manifest.tensors if not name.startswith("optimizer.")}
    assert names == {"lora_a", "lora_b", "magnitude"}
    assert all("lora_" in name or "magnitude" in name for name in manifest.tensors)
    assert manifest.state[BASE_STATE]["path"] == str(base)


def test_a_frozen_adapter_is_kept(gloo_pool: GlooPool, base: Path, tmp_path: Path) -> None:
    """The base lacks it, so nothing else could give it its values."""
    freeze = {"model": {"handlers": ["lora", "freeze"]}}
    tables = {"lora": {"dora": True}, "freeze": {"patterns": ["*.lora_a", "*.magnitude"]}}
    case = Case(shard=1, settings={**freeze, "handlers": tables})
    [first] = on(gloo_pool, case, tmp_path, base, 1)
    names = {name.split(".")[-1] for name in read_manifest(tmp_path / "step-1").tensors}
    assert {"lora_a", "lora_b", "magnitude"} <= names
    [again] = on(gloo_pool, case, tmp_path, base, 2)
    assert not again.error and again.loaded == first.content


def test_the_first_loss_is_the_base_models(gloo_pool: GlooPool, base: Path, tmp_path: Path) -> None:
    """To the bit without DoRA, whose quotient of two lengths is rounded."""
    lora = {"model": {"handlers": ["lora"]}, "handlers": {"lora": {"dropout": 0.5}}}
    dora = {"model": {"handlers": ["lora"]}, "handlers": {"lora": {"dora": True}}}
    first = {}
    for name, settings in (("plain", {}), ("lora", lora), ("dora", dora)):
        [leg] = on(gloo_pool, Case(shard=1, settings=settings), tmp_path / name, base, 1)
        first[name] = leg.losses[0]
    assert first["lora"] == first["plain"]
    assert first["dora"] == pytest.approx(first["plain"], rel=1e-13)


def test_a_run_starts_from_the_adapters_of_another(
    gloo_pool: GlooPool, base: Path, tmp_path: Path
) -> None:
    """The base of the first is the base of the second."""
    legs = on(gloo_pool, TENSOR, tmp_path / "one", base, 1)
    again = on(gloo_pool, PIPELINE, tmp_path / "two", tmp_path / "one" / "step-1", 1)
    expected = {n: d for n, d in whole(legs, "content").items() if not n.startswith("optimizer.")}
    found = {n: d for n, d in whole(again, "loaded").items() if not n.startswith("optimizer.")}
    assert found == expected
    bases = [read_manifest(tmp_path / n / "step-1").state[BASE_STATE] for n in ("one", "two")]
    assert bases[0] == bases[1]


@pytest.fixture(scope="module")
def trained(gloo_pool: GlooPool, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step with adapters of queries only."""
    folder = tmp_path_factory.mktemp("trained")
    on(gloo_pool, Case(shard=1, settings=QUERIES), folder, base, 1)
    return folder / "step-1"


def test_adapters_of_other_targets_are_no_start(
    gloo_pool: GlooPool, trained: Path, tmp_path: Path
) -> None:
    """Magnitudes that are not in the step would not be the lengths of rows."""
    more = {**QUERIES, "handlers": {"lora": {"dora": True, "targets": ["w[qk]"]}}}
    [leg] = on(gloo_pool, Case(shard=1, settings=more), tmp_path / "two", trained, 1)
    assert "does not fit the model: layers.0.attention.wk.lora_a is not in it" in leg.error


@pytest.mark.parametrize(
    ("handler", "settings", "refused"),
    [("lora", {}, False), ("lora", {"alpha": 1.0}, True), ("qlora", {"rslora": True}, True)],
)
def test_adapters_of_another_scale_are_no_start(
    handler: str, settings: dict[str, Any], refused: bool, trained: Path, tmp_path: Path
) -> None:
    """They would be another model: B A times another number."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"handlers": [handler]},
        "handlers": {handler: {"targets": ["wq"], "dora": True, **settings}},
        "checkpoint": {"enable": True, "initial_load_path": str(trained)},
        "job": {"dump_folder": str(tmp_path)},
    }
    config = Case(shard=1, settings=sections, args={"dim": 64}).config()
    issues = preflight(RunContext(config, 1, "cpu"), [MODEL])
    assert [issue.key for issue in issues] == [f"handlers.{handler}.alpha"] * refused


@pytest.fixture
def moved(gloo_pool: GlooPool, base: Path, tmp_path: Path) -> Any:
    """A run after a step, whose base is then moved away; the run's folder and the new place."""
    first, second = tmp_path / "hf", tmp_path / "elsewhere"
    shutil.copytree(base, first)
    on(gloo_pool, TENSOR, tmp_path / "run", first, 1)
    first.rename(second)
    return tmp_path / "run", second


def test_a_base_that_was_moved(gloo_pool: GlooPool, moved: Any, tmp_path: Path) -> None:
    run, place = moved
    legs = on(gloo_pool, TENSOR, run, tmp_path / "hf", 2)
    assert "does not exist. Fix: restore it" in legs[0].error
    legs = on(gloo_pool, TENSOR, run, place, 2)
    assert not legs[0].error and len(legs[0].losses) == 1


@pytest.mark.fault("F53")
def test_a_base_that_was_changed(gloo_pool: GlooPool, moved: Any) -> None:
    run, place = moved
    file = place / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for leg in on(gloo_pool, TENSOR, run, place, 2):
        assert "is not the one that the checkpoint was trained on" in leg.error
        assert f"{place} (it was" in leg.error
