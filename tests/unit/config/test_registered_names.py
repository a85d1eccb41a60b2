"""Registries: who gives a name, and what happens when two do, or when it cannot be imported."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.forked import execute
from torchtitan.config import ConfigError
from torchtitan.config.custom_import import import_modules
from torchtitan.config.registry import BUILT_IN, Registry
from torchtitan.config.schema import Section
from torchtitan.handlers.masks import register_mask
from torchtitan.handlers.registry import HANDLERS, HandlerEntry, register_handler
from torchtitan.loss.registry import register_loss
from torchtitan.metrics.sinks import SINKS, SinkEntry, register_sink
from torchtitan.optim.lr_scheduler import register_schedule
from torchtitan.optim.registry import register_optimizer

GROUP = "torchtitan.tests"


def admit(name: str, thing: Any) -> int:
    if not isinstance(thing, int):
        raise TypeError(f"{thing!r} is no number")
    return thing


def make_package(folder: Path, name: str, entry_points: dict[str, str], code: str) -> None:
    """An installed package, as `importlib.metadata` finds it."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    lines = "\n".join(f"{key} = {value}" for key, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def registry() -> Registry[int]:
    made: Registry[int] = Registry("section.key", GROUP, admit)
    made.add_built_in("one", 1)
    return made


def refusal(numbers: Registry[int], name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        numbers.get(name)
    [problem] = caught.value.problems
    assert problem.key == "section.key" and problem.value == name
    return str(problem)


def test_the_three_ways(installed: Path) -> None:
    make_package(installed, "reg_good", {"two": "reg_good:TWO"}, "TWO = 2\n")
    numbers = registry()
    numbers.register("three", 3, "a.module")
    assert {name: numbers[name] for name in numbers} == {"one": 1, "three": 3, "two": 2}
    origins = {name: numbers.origin(name) for name in numbers}
    assert origins == {"one": BUILT_IN, "three": "a.module", "two": "reg_good 1.5"}
    assert "two" in numbers and "four" not in numbers and numbers.get("four") is None


def test_a_package_is_imported_when_its_name_is_used(installed: Path) -> None:
    make_package(installed, "reg_lazy", {"lazy": "reg_lazy:X"}, "X = 5\n")
    numbers = registry()
    assert list(numbers) == ["one", "lazy"] and numbers["one"] == 1
    assert "reg_lazy" not in sys.modules
    assert numbers["lazy"] == 5 and "reg_lazy" in sys.modules


def test_nothing_is_replaced(installed: Path) -> None:
    numbers = registry()
    numbers.register("three", 3, "a.module")
    numbers.register("three", 33, "a.module")  # imported anew
    assert numbers["three"] == 33
    for name, owner in (("three", "a.module"), ("one", BUILT_IN)):
        with pytest.raises(ValueError, match=f"registered already, by {owner}"):
            numbers.register(name, 4, "another.module")
    make_package(installed, "reg_a", {"one": "reg_a:X", "five": "reg_a:X"}, "X = 5\n")
    make_package(installed, "reg_b", {"five": "reg_b:X"}, "X = 6\n")
    fresh = registry()
    assert "given by built in and reg_a 1.5" in refusal(fresh, "one")
    text = refusal(fresh, "five")
    assert "reg_a 1.5" in text and "reg_b 1.5" in text and "uninstall one" in text


def test_a_module_gives_a_name_once_each_time_it_is_imported(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = registry()
    monkeypatch.setattr(sys.modules[__name__], "NUMBERS", numbers, raising=False)
    code = f"import {__name__} as tests\ntests.NUMBERS.register('two', 2, __name__)\n"
    (installed / "reg_once.py").write_text(code)
    module = importlib.import_module("reg_once")
    importlib.reload(module)
    numbers.register("two", 2, "reg_once")
    with pytest.raises(ValueError, match="registered already, by reg_once"):
        numbers.register("two", 3, "reg_once")
    assert numbers["two"] == 2


def test_a_module_of_a_package_may_register_itself_too(installed: Path) -> None:
    make_package(installed, "reg_both", {"two": "reg_both:TWO"}, "TWO = 2\n")
    numbers = registry()
    numbers.register("two", 2, "reg_both")
    assert numbers["two"] == 2


@pytest.mark.parametrize(
    "register",
    [
        register_handler,
        register_loss,
        register_optimizer,
        register_schedule,
        register_sink,
        register_mask,
    ],
)
def test_a_decorator_without_a_name_is_refused(register: Any) -> None:
    """It would take the class for the name, and register nothing."""
    with pytest.raises(TypeError, match="is no name: write one behind the decorator"):
        register(Registry)


@pytest.mark.parametrize("name", ["a.b", "a-b", "two words", "class", ""])
def test_a_name_of_a_table_is_a_word(name: str) -> None:
    """So that it can be written on the command line, too."""
    entries = (HANDLERS, HandlerEntry(Section, lambda: Any)), (SINKS, SinkEntry(Section, Any))
    for registry_of, entry in entries:
        with pytest.raises(TypeError, match="has to be a word"):
            registry_of.register(name, entry, "a.module")


def test_a_script_that_ends_python_ends_no_run(installed: Path) -> None:
    make_package(installed, "reg_exit", {"exit": "reg_exit:X"}, "import sys; sys.exit(0)\n")
    assert "SystemExit: 0" in refusal(registry(), "exit")
    [problem] = import_modules(["reg_exit"])
    assert problem.value == "reg_exit" and "SystemExit: 0" in str(problem)


def test_a_module_in_a_zip_file_can_be_imported(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(installed / "code.zip", "w") as archive:
        archive.writestr("reg_zipped.py", "X = 1\n")
    monkeypatch.syspath_prepend(installed / "code.zip")
    assert import_modules(["reg_zipped"]) == []
    assert "reg_zipped.py (not a file of its own)" in capsys.readouterr().err


def test_what_is_broken_is_told_with_its_own_traceback(installed: Path) -> None:
    make_package(installed, "reg_bad", {"bad": "reg_bad:X", "text": "reg_bad2:X"}, "1 / 0\n")
    (installed / "reg_bad2.py").write_text("X = 'words'\n")
    numbers = registry()
    text = refusal(numbers, "bad")
    assert "reg_bad 1.5" in text and "ZeroDivisionError" in text and "reg_bad.py" in text
    assert "<frozen importlib" not in text and "registry.py" not in text, "what led to it"
    assert "'words' is no number" in refusal(numbers, "text")
    assert numbers.entries() == {"one": 1}, "the others can be used"


def test_a_type_error_of_an_import_is_not_one_of_what_is_given(installed: Path) -> None:
    make_package(installed, "reg_type", {"bad": "reg_type:X"}, "import reg_inner\nX = 1\n")
    (installed / "reg_inner.py").write_text("1 + 'a'\n")
    text = refusal(registry(), "bad")
    assert "whose import failed" in text and "does not fit" not in text
    assert re.findall(r'File ".*/(\w+.py)", line 1', text) == ["reg_type.py", "reg_inner.py"]


EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "titan_extras"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the example package is installed in, by pip."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "titan_extras"
    subprocess.run(["cp", "-r", str(EXAMPLE), str(source)], check=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder)]
    subprocess.run([*command, str(source)], check=True, timeout=120)
    return folder


def test_the_example_package_trains(example: Path, tmp_path: Path) -> None:
    """Everything that it adds, in one run on two ranks that cut the matrices, as its page shows."""
    env = runs.environment()
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(example)])
    words = (
        "--model.print_after_conversion",
        "--parallelism.tensor_parallel_degree=2",
        "--training.steps=4",
    )
    command = runs.command(tmp_path / "run", *words, processes=2)
    page = (EXAMPLE / "README.md").read_text("utf-8")
    shown = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    dataset = '[training]\ndataset = "stdlib"\n'
    assert shown and dataset in runs.CONFIG
    config = runs.CONFIG.replace(dataset, shown[1])
    (tmp_path / "config.toml").write_text(config)
    done = execute(command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("ReluSquaredFeedForward") == 1
    assert len(runs.curve(tmp_path / "run")) == 4
    manifest = json.loads((tmp_path / "run/checkpoint/step-4/manifest.json").read_text())
    kept = {name.rpartition(".")[2] for name in manifest["tensors"] if "optimizer." in name}
    assert kept == {"average"}, "of Lion"
    plain = runs.command(tmp_path / "plain", *words[1:], "--loss.name=cross_entropy", processes=2)
    config = config.replace("args = { epsilon = 0.5 }\n", "")
    (tmp_path / "config.toml").write_text(config)
    done = execute(plain, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    first, other = (runs.curve(tmp_path / name)[0][1] for name in ("run", "plain"))
    assert 0.4 < first - other < 0.5, "half of what is missing of a probability of 1"


def test_the_example_package_is_listed(example: Path) -> None:
    """Without a word about it in a config, and without torch."""
    code = (
        "import sys; from torchtitan.cli import main;"
        " main(['list', 'handlers', 'losses', 'optimizers']);"
        " assert 'torch' not in sys.modules; main(['list', 'datasets'])"
    )
    env = runs.environment()
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(example)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    origin = "(from titan-extras 0.1.0)"
    assert f"relu_squared settings: every {origin}" in rows
    assert f"poly settings: epsilon {origin}" in rows
    assert f"Lion settings: beta1, beta2 {origin}" in rows
    assert any(row.startswith("sums ") and row.endswith(origin) for row in rows)
