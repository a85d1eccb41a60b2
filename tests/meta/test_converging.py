"""The runs of docs/design/converging.md can be started, and the page has them all."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import ARITHMETIC, errors_of, preflight

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    path = ROOT / "scripts" / "make_converging.py"
    spec = importlib.util.spec_from_file_location("make_converging", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
LEGS = [(run.name, leg) for run in script.RUNS for leg in run.legs]


@pytest.mark.parametrize(("name", "leg"), LEGS, ids=[name for name, _ in LEGS])
def test_every_run_passes_its_check(name: str, leg):
    loaded = load_config(script.command_line(leg))
    context = RunContext(loaded.config, leg.processes, "cpu")
    assert errors_of(preflight(context, [ARITHMETIC])) == []
    assert context.global_batch_size == script.BATCH
    assert loaded.config.training.steps == script.STEPS


def test_the_meshes_are_six_and_names_are_unique():
    names = [run.name for run in script.RUNS]
    assert len(set(names)) == len(names)
    meshes = {leg for run in script.RUNS if run.group == script.MESH for leg in run.legs}
    seed = [leg for leg in meshes if any("seed" in argument for argument in leg.arguments)]
    assert len(meshes) - len(seed) == 6


def test_the_page_has_a_row_for_every_run():
    page = script.PAGE.read_text(encoding="utf-8")
    made = page.partition(script.BEGIN)[2].partition(script.END)[0]
    rows = [line for line in made.splitlines() if line.startswith("| ")][1:]
    labels = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in rows]
    assert labels == [(run.group, run.label) for run in script.RUNS]


def test_a_row_tells_the_differences():
    reference = [4.0] * script.STEPS
    losses = [4.0] * 50 + [4.5] + [4.0] * (script.STEPS - 51)
    curves = {"reference": reference, "fsdp": losses}
    (run,) = [run for run in script.RUNS if run.name == "fsdp"]
    cells = [cell.strip() for cell in script.row(run, curves).split("|")[1:-1]]
    assert cells == ["meshes", "FSDP 2", "2", "0", "5.0e-01", "5.0e-01", "4.0000", "0"]
    curves["fsdp"] = [loss + 0.25 for loss in reference]
    assert script.row(run, curves).endswith("| 4.2500 | +2.5e-01 |")
    assert "not run" in script.row(run, {"reference": reference})


def test_curves_are_means_of_the_steps_before():
    losses = [float(n) for n in range(script.STEPS)]
    means = script.smoothed(losses)
    assert means[:3] == [0.0, 0.5, 1.0]
    window = losses[-script.SMOOTHED :]
    assert math.isclose(means[-1], sum(window) / len(window))
