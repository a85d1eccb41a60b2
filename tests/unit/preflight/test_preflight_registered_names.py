"""Optimizers, schedules and sinks by name: what a config may say, and a run with one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.forked import execute
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import LRScheduler, Section
from torchtitan.metrics import sinks as sink_registry
from torchtitan.metrics.sinks import SINKS
from torchtitan.optim import lr_scheduler as schedule_registry
from torchtitan.optim import registry as optimizer_registry
from torchtitan.optim.lr_scheduler import SCHEDULES, Schedule, register_schedule
from torchtitan.optim.registry import OPTIMIZERS, OptimizerEntry
from torchtitan.preflight import MODEL, optim, outputs, preflight
from torchtitan.preflight.optim import check_environment


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (OPTIMIZERS, SCHEDULES, SINKS):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def context(**sections: Any) -> RunContext:
    return RunContext(JobConfig.model_validate(sections), 1, "cpu")


def check_static(context: RunContext) -> list[ConfigIssue]:
    return [*optim.check_static(context), *outputs.check_static(context)]


def problems(**sections: Any) -> list[str]:
    return [
        str(problem) for problem in check_static(context(**sections)) if problem.severity == "error"
    ]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_passes_by_itself(name: str) -> None:
    assert problems(optimizer={"name": name}) == []


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"name": "Muom"}, ['optimizer.name = "Muom": is not an optimizer', '"Muon"']),
        (
            {"name": "SGD", "args": {"momentun": 0.9}},
            ["optimizer.args.momentun: is unknown", "momentum"],
        ),
        ({"name": "SGD", "args": {"momentum": "0.9"}}, ["optimizer.args.momentum", "quotes"]),
        ({"name": "SGD", "args": {"nesterov": True}}, ["nesterov", "needs momentum above 0"]),
        ({"args": {"momentum": 0.9}}, ["optimizer.args.momentum: is unknown"]),
        ({"name": "Muon", "args": {"ns_steps": 100}}, ["optimizer.args.ns_steps", "less than 100"]),
        ({"name": "Adafactor", "args": {"d": 0.5}}, ["optimizer.args.d = 0.5", "at least 1"]),
        (
            {"name": "Muon", "early_step_in_backward": True},
            ["optimizer.early_step_in_backward = true: Muon cannot: its step communicates"],
        ),
    ],
)
def test_mistakes_about_the_optimizer(optimizer: dict[str, Any], expected: list[str]) -> None:
    [text] = problems(optimizer=optimizer, training={"max_norm": float("inf")})
    for part in expected:
        assert part in text


def test_muon_s_patterns_are_compared_with_the_model() -> None:
    config = context(optimizer={"name": "Muon", "args": {"patterns": ["layer.*", "layers.*"]}})
    [problem] = preflight(config, [MODEL])
    assert problem.key == "optimizer.args.patterns[0]"
    assert 'did you mean "layers.*"?' in problem.fix


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "warmup_stable_deacy"}, ["is not a schedule", '"warmup_stable_decay"']),
        ({"args": {"power": 2}}, ["has its settings in [lr_scheduler] itself", "warmup_steps"]),
        ({"name": "mine", "args": {"powr": 2.0}}, ["lr_scheduler.args.powr", '"power"']),
    ],
)
def test_mistakes_about_the_schedule(section: dict[str, Any], expected: list[str]) -> None:
    register_schedule("mine", Power)(power)
    [text] = problems(lr_scheduler=section)
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"optimizer": {"name": "SGD", "beta1": 0.8}}, "optimizer.beta1 = 0.8: SGD has no use"),
        ({"optimizer": {"name": "Adafactor", "implementation": "foreach"}}, "implementation"),
        ({"lr_scheduler": {"name": "mine", "warmup_steps": 200}}, "warmup_steps = 200: mine has"),
    ],
)
def test_what_stands_in_a_file_for_another_choice_is_a_warning(
    sections: Any, expected: str
) -> None:
    """So that an optimizer, or a schedule, can be tried from the command line alone."""
    register_schedule("mine", Power)(power)
    [problem] = check_static(context(**sections))
    assert expected in str(problem) and problem.severity == "warning"


class Power(Section):
    power: float = 1.0
    """Of the share of the run that is left."""


def power(step: int, training_steps: int, settings: Power) -> float:
    return (1 - (step - 1) / training_steps) ** settings.power


def test_muon_without_matrices_is_refused() -> None:
    config = context(optimizer={"name": "Muon", "args": {"patterns": []}})
    [problem] = preflight(config, [MODEL])
    assert problem.key == "optimizer.args.patterns"
    assert "no matrix would be orthogonalised" in problem.problem


def test_a_schedule_of_one_s_own() -> None:
    register_schedule("mine", Power)(power)
    section = LRScheduler(name="mine", args={"power": 2.0})
    schedule = Schedule(section, 4)
    assert [schedule(step) for step in (1, 2, 3, 4)] == [1.0, 0.75**2, 0.25, 0.0625]
    config = {"lr_scheduler": {"name": "mine"}, "training": {"steps": 4}}
    assert problems(**config) == []
    assert check_environment(context(**config)) == []
    # The keys of the library's schedule are not judged: a warmup of 9 does not fit into 4 steps.
    config["lr_scheduler"]["warmup_steps"] = 9
    assert problems(**config) == []
    assert "warmup_steps" in problems(**config | {"lr_scheduler": {"warmup_steps": 9}})[0]


@pytest.mark.parametrize("factor", [float("nan"), -0.5])
def test_a_schedule_that_gives_no_factor_is_found_before_the_run(factor: float) -> None:
    register_schedule("late")(lambda step, steps, settings: factor if step == steps else 1.0)
    [problem] = check_environment(context(lr_scheduler={"name": "late"}))
    assert f"gives {factor} for step 10000" in problem.problem


def test_a_schedule_that_raises_is_named_with_its_line() -> None:
    register_schedule("broken")(lambda step, steps, settings: 1 / 0)
    [problem] = check_environment(context(lr_scheduler={"name": "broken"}))
    assert (problem.key, problem.value) == ("lr_scheduler.name", "broken")
    assert "fails at step 1" in problem.problem and "ZeroDivisionError" in problem.problem
    with pytest.raises(ConfigError, match="broken"):
        Schedule(LRScheduler(name="broken"), 3)(1)


def test_a_schedule_s_factor_is_a_number() -> None:
    """Not what looks like one: `float` would take it."""
    register_schedule("text")(lambda step, steps, settings: "0.5")
    [problem] = check_environment(context(lr_scheduler={"name": "text"}))
    assert "not the text '0.5'" in problem.problem


class Lines:
    """A sink."""

    class Settings(Section):
        file: str = "lines.txt"
        """Name of the file."""

    name, keeps_trying = "lines", False

    def resume(self, step: int) -> None: ...

    write = flush = close = resume


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"metrics": {"sinks": ["line"]}}, ['metrics.sinks = "line": is not a sink', '"lines"']),
        ({"metrics": {"sinks": ["lines", "lines"]}}, ["is listed twice"]),
        ({"sinks": {"lnes": {}}}, ["sinks.lnes: is not a sink", '"lines"']),
        ({"sinks": {"lines": {"fil": "x"}}}, ["sinks.lines.fil: is unknown", '"file"']),
    ],
)
def test_mistakes_about_sinks(sections: dict[str, Any], expected: list[str]) -> None:
    sink_registry.register_sink("lines")(Lines)
    [text] = problems(**sections)
    for part in expected:
        assert part in text


def test_what_is_registered_has_to_fit() -> None:
    lacking = {"build": classmethod(lambda *_: None)}
    with pytest.raises(TypeError, match="lacks initial_state"):
        optimizer_registry.register_optimizer("Mine")(type("Mine", (), lacking))
    with pytest.raises(TypeError, match="lacks flush, close"):
        members = {"resume": print, "write": print, "name": "a", "keeps_trying": True}
        sink_registry.register_sink("mine")(type("Mine", (), members))
    with pytest.raises(TypeError, match="neither a function nor"):
        schedule_registry.entry_of("mine", 3)
    with pytest.raises(ValueError, match="registered already, by built in"):
        OPTIMIZERS.register("AdamW", OptimizerEntry(Section, lambda: print), "mine")


MODULE = '''
import torch

from torchtitan.optim.registry import register_optimizer
from torchtitan.optim.lr_scheduler import register_schedule
from torchtitan.metrics.sinks import register_sink
from torchtitan.config.schema import Section


@register_optimizer("Signs")
class Signs(torch.optim.Optimizer):
    class Settings(Section):
        decay: float = 0.5

    uses = ("eps",)

    @classmethod
    def build(cls, groups, section, settings, device):
        assert section.eps == 1e-3 and groups[0]["names"]
        optimizer = cls(groups, {"lr": section.lr})
        optimizer.decay = settings.decay
        return optimizer

    def initial_state(self, parameter, group):
        return {"average": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = self.initial_state(parameter, group)
                average = self.state[parameter]["average"].lerp_(parameter.grad, 1 - self.decay)
                parameter.add_(average.sign(), alpha=-group["lr"])


@register_schedule("steps")
def steps(step, training_steps, settings):
    return 0.5 ** (step // 3)


class Lines:
    class Settings(Section):
        file: str = "lines.txt"

    name, keeps_trying = "lines", False

    def __init__(self, settings, run):
        assert run.rank is None and run.run_id and run.config["optimizer"]["name"] == "Signs"
        self.file = open(run.folder / settings.file, "a")

    def resume(self, step):
        print("after", step, file=self.file)

    def write(self, record):
        print(record["step"], record["lr"], file=self.file)

    def flush(self):
        self.file.flush()

    def close(self, failed=False):
        self.file.close()


register_sink("lines")(Lines)


@register_sink("broken")
class Broken(Lines):
    name = "broken"

    def __init__(self, settings, run):
        """Opens nothing."""

    def write(self, record):
        raise OSError("the place is gone")
'''


def test_a_run_with_an_optimizer_a_schedule_and_sinks_of_one_s_own(tmp_path: Path) -> None:
    """And its resume. A sink that fails is reported, once, and stops nothing."""
    (tmp_path / "my_parts.py").write_text(MODULE)
    env = {**runs.environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def run(steps: int) -> str:
        command = runs.command(
            tmp_path / "run",
            "--job.custom_import=my_parts",
            "--optimizer.name=Signs",
            "--optimizer.eps=1e-3",
            "--optimizer.lr=0.01",
            "--optimizer.args.decay=0.9",
            "--lr_scheduler.name=steps",
            "--lr_scheduler.warmup_steps=200",
            "--metrics.sinks=lines,broken",
            "--sinks.lines.file=mine.txt",
            f"--training.steps={steps}",
        )
        done = execute(command, env=env)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run(4).count("broken cannot be written, training continues") == 1
    run(6)
    expected = [0.01, 0.01, 0.005, 0.005, 0.005, 0.0025]
    assert [record["lr"] for record in runs.records(tmp_path / "run")] == expected
    lines = [f"{step} {lr}" for step, lr in enumerate(expected, start=1)]
    written = (tmp_path / "run" / "mine.txt").read_text().splitlines()
    assert written == ["after 0", *lines[:4], "after 4", *lines[4:]]
    [manifest] = (tmp_path / "run" / "checkpoint" / "step-6").glob("manifest*.json")
    tensors = json.loads(manifest.read_text())["tensors"]
    assert "optimizer.tok_embeddings.weight.average" in tensors


def test_checking_names_imports_no_torch() -> None:
    code = """
import sys
from torchtitan.preflight.optim import check_static
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext

config = JobConfig.model_validate({"optimizer": {"name": "Muon"}})
check_static(RunContext(config, 1, "cpu"))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=runs.environment())
