"""Which checks run in which phase, and what becomes of absent files."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from torchtitan import preflight as module
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import (
    ARITHMETIC,
    CHECKPOINTS,
    FILES,
    HARDWARE,
    errors_of,
    preflight,
    require,
)


def context(*arguments: str, full: bool = True, world_size: int = 1) -> RunContext:
    return RunContext(load_config(arguments).config, world_size, "cpu", full=full)


@pytest.fixture
def feature(monkeypatch: pytest.MonkeyPatch):
    """A feature of the test's own, the only one beside the mesh's."""
    found: dict[str, list[ConfigIssue]] = {"check": [], "probe": []}
    calls: list[str] = []
    made = types.ModuleType("own_feature")

    def answer(name: str):
        def function(context: RunContext) -> list[ConfigIssue]:
            calls.append(name)
            return found[name]

        return function

    made.check_static, made.check_environment = answer("check"), answer("probe")  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "STATIC", (module.mesh, made))
    monkeypatch.setattr(module, "ENVIRONMENT", {FILES: (made,), HARDWARE: (made,)})
    return found, calls


ABSENT = ConfigIssue("data", "is not there", "fetch it", missing_asset=True)
WRONG = ConfigIssue("key", "is wrong", "mend it")


def test_debug_model_has_no_problem():
    arguments = ["--training.dataset=stdlib", "--training.seq_len=256"]
    assert errors_of(preflight(context(*arguments))) == []


def test_arithmetic_reads_no_file(feature):
    found, calls = feature
    found["check"] = [WRONG]
    assert preflight(context(), [ARITHMETIC]) == [WRONG]
    assert calls == ["check"]


def test_files_are_looked_at_after_arithmetic(feature):
    found, calls = feature
    found["probe"] = [ABSENT]
    assert preflight(context(), [ARITHMETIC, FILES]) == [ABSENT]
    assert calls == ["check", "probe"]


def test_a_phase_reports_only_its_own(feature):
    found, _ = feature
    found["check"] = [ConfigIssue("key", "is odd", "look", severity="warning")]
    found["probe"] = [ABSENT]
    assert preflight(context(), [FILES]) == [ABSENT]


def test_broken_feature_is_not_probed(feature):
    found, calls = feature
    found["check"] = [WRONG]
    preflight(context())
    assert calls == ["check"]


def test_nothing_is_probed_on_a_broken_mesh(feature):
    _, calls = feature
    preflight(context("--parallelism.data_parallel_shard_degree=3"))
    assert calls == ["check"]


def test_same_problem_is_told_once(feature):
    found, _ = feature
    found["check"] = [WRONG, WRONG]
    assert preflight(context(), [ARITHMETIC]) == [WRONG]


def test_away_from_the_machine_absent_files_are_warnings(feature):
    found, calls = feature
    found["probe"] = [ABSENT, WRONG]
    problems = preflight(context(full=False))
    assert [problem.severity for problem in problems] == ["warning", "error"]
    assert calls == ["check", "probe"]  # the files, and not the hardware
    assert [p.severity for p in preflight(context())] == ["error", "error"]
    assert calls == ["check", "probe"] * 1 + ["check", "probe", "probe"]


def test_a_wrong_name_is_no_second_error_beside_a_stored_run(feature, monkeypatch):
    found, _ = feature
    made = module.STATIC[-1]
    monkeypatch.setattr(module, "ENVIRONMENT", {CHECKPOINTS: (module.checkpoint, made)})
    monkeypatch.setattr(module.optim, "check_static", lambda context: [WRONG])
    monkeypatch.setattr(module, "STATIC", (module.mesh, module.optim, made))
    found["probe"] = [replace(WRONG, problem="differs from the stored run")]
    assert preflight(context(), [ARITHMETIC, CHECKPOINTS]) == [WRONG]
    assert preflight(context(), [CHECKPOINTS]) == found["probe"]
    # A warning of the same key, or an absent file elsewhere, does not hide that error.
    for warning in (replace(WRONG, severity="warning"), replace(WRONG, missing_asset=True)):
        monkeypatch.setattr(module.optim, "check_static", lambda context, w=warning: [w])
        problems = preflight(context(full=False), [ARITHMETIC, CHECKPOINTS])
        assert [problem.severity for problem in problems] == ["warning", "error"]


def test_require_prints_warnings_and_raises_errors(feature, capsys: pytest.CaptureFixture[str]):
    found, _ = feature
    warning = ConfigIssue("key", "is odd", "look", severity="warning")
    found["check"] = [warning]
    require(context())
    assert capsys.readouterr().err == f"warning: {warning}\n"
    require(context(), quiet=True)
    assert capsys.readouterr().err == ""
    found["check"] = [warning, WRONG]
    with pytest.raises(ConfigError) as caught:
        require(context())
    assert caught.value.problems == [WRONG]


def test_every_check_is_run():
    """A module with a check that nobody lists would silently go unasked."""
    asked = {"check_static": set(module.STATIC)}
    asked["check_environment"] = {m for modules in module.ENVIRONMENT.values() for m in modules}
    for path in Path(module.__file__).parent.glob("[a-z]*.py"):
        subject = getattr(module, path.stem, None) or sys.modules[f"{module.__name__}.{path.stem}"]
        for name, subjects in asked.items():
            assert hasattr(subject, name) == (subject in subjects), f"{path.stem}.{name}"


def test_the_model_is_built_once(monkeypatch: pytest.MonkeyPatch):
    built = []
    build = module.model.build_on_meta
    monkeypatch.setattr(module.model, "build_on_meta", lambda c: built.append(1) or build(c))
    whole = context("--training.dataset=stdlib", "--training.seq_len=256")
    assert errors_of(preflight(whole)) == []
    assert built == [1]
