"""`torchtitan bisect`: the first tensor in which two trainings of a step differ."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.commands.bisect_sides import FLOAT64, Recipe, Side, read_side, recipe
from torchtitan.commands.printing import json_values
from torchtitan.commands.replay import new_folder
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE, FAILED
from torchtitan.utils.text import plural, some_of

if TYPE_CHECKING:
    from torchtitan.training.recorded_tensors import RecordedTensors
    from torchtitan.training.step_compare import Comparison, Difference

_SHOWN = 5
_WHAT = {
    "batch": "{} of the batch",
    "parameters": "parameter {} before the step",
    "forward": "output of {}",
    "loss": "{}",
    "backward": "gradient of the input of {}",
    "gradients": "gradient of {}",
    "gradient norm": "{}",
    "updated parameters": "parameter {} after the step",
}


def run(options: argparse.Namespace) -> int:
    """Train both sides, compare them and print what differs."""
    sides = [read_side("A", options.one), read_side("B", options.other)]
    with new_folder(options.keep) as folder:
        tensors = _recorded(sides, folder, options)

        from torchtitan.training.step_compare import compare_steps

        one, other, *exact = [_open(path) for path in tensors]
        result = compare_steps(
            one,
            other,
            exact[0] if exact else None,
            bound=options.bound,
            most=_SHOWN,
            on_phase=lambda phase: _say(f"comparing: {phase}"),
        )
        for opened in (one, other, *exact):
            opened.close()
    report = json.dumps(json_values(asdict(result)))
    print(report if options.json else "\n".join(_describe(result)))
    return FAILED if result.differences else DONE


def _recorded(sides: list[Side], folder: Path, options: argparse.Namespace) -> list[Path]:
    """Train what is not recorded yet; return the folders of A, of B, and of A in float64."""
    settings, formats = options.settings, [] if options.as_is else FLOAT64
    recipes: list[Recipe | None] = []
    for side, other in (sides, sides[::-1]):
        like = recipes[0] if recipes else None
        found = None if side.is_recorded else (side, other, folder / side.name)
        recipes.append(None if found is None else recipe(*found, settings, formats, like))
    if options.as_is and options.bound is None:
        if recipes[0] is None:
            text = "is recorded, so its rounding cannot be measured"
            raise sides[0].refuse(text, "give a --bound, or record both in float64")
        a, b = sides
        recipes.append(recipe(a, b, folder / "A-float64", settings, FLOAT64, recipes[0]))
    trainings = list(filter(None, recipes))
    for training in trainings:
        training.check()  # all of them, before the first takes its time
    for training in trainings:
        begun = time.monotonic()
        _say(f"training {training.side.name}: {training.title}")
        training.train()
        _say(f"trained and recorded in {time.monotonic() - begun:.0f} s")
    paths = [side.path for side in sides]
    return [
        training.tensors if training is not None else path
        for training, path in zip(recipes, [*paths, paths[0]])
    ]


def _open(folder: Path) -> "RecordedTensors":
    from torchtitan.training.recorded_tensors import RecordedTensors

    try:
        return RecordedTensors(folder)
    except (OSError, ValueError, KeyError) as error:
        fix = "record both sides anew"
        raise ConfigError(ConfigIssue("FOLDER", f"{error}", fix, str(folder))) from error


def _describe(result: "Comparison") -> Iterator[str]:
    agree = f"within {result.largest:.0e}" if result.largest else "exactly"
    counts = ", ".join(f"{n} {phase}" for phase, n in result.counts.items() if n)
    if not result.differences:
        yield f"no difference: {counts} agree {agree}"
    for number, found in enumerate(result.differences):
        title = "first difference" if number == 0 else "then"
        phase = "" if found.name == found.phase else f"{found.phase}, "
        yield f"{title}: {phase}{_text(found)}"
        if number == 0:
            total = plural(sum(result.counts.values()), "tensor")
            before = f"everything before it agrees {agree} ({total}: {counts})"
            before = before if counts else "it is the first that is compared"
            yield f"{before}; rounding explains up to {result.bound:.0e}"
    if result.skipped:
        yield f"not compared, as one side lacks it or has other shapes: {some_of(result.skipped)}"


def _text(found: "Difference") -> str:
    name, _, number = found.name.partition(" #")
    what = _WHAT[found.phase].format(name) + (f", number {number}" if number else "")
    place = ", ".join(f"{dimension} {index}" for dimension, index in found.index.items())
    a, b = found.values
    text = f"{what}{f' [{place}]' if place else ''}: {a:.9g} (A), {b:.9g} (B)"
    if math.isfinite(found.relative):
        text += f", apart by {found.relative:.0e} of the largest value"
    text += f"; {found.where}" if found.where else ""
    return text if found.ratio is None else f"{text}; B is {found.ratio:.6g} times A throughout"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
