"""Tasks of lm-eval by name: loaded and checked before anything runs, then measured.

lm-eval, and torch, are imported where they are used. Tasks draw solved examples from generators of
their own; the state of the global ones, which some use, is put back.
"""

import importlib.util
import logging
import math
import os
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchtitan.config.errors import ConfigError, ConfigIssue, DataError
from torchtitan.config.schema import Evaluation
from torchtitan.config.suggest import nearest
from torchtitan.utils.environment import is_quiet_rank

if TYPE_CHECKING:
    from torchtitan.evaluation.harness import HarnessModel

PACKAGE = "lm_eval"
GENERATES = "generate_until"
_FEWSHOT_SEED = 1234
_RESAMPLES = 1000
"""For the standard errors of metrics that have no formula for it."""
_CORRECT = "correct its file or its data"
_OFFLINE = (
    "run once where the hub can be reached, or give local files as `dataset_path: json`,"
    " `dataset_kwargs: {data_files: ...}`"
)


@dataclass(frozen=True)
class TaskChoice:
    """The tasks to run and how, with the keys that messages name."""

    names: Sequence[str]
    task_dir: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    key: str = "--tasks"
    dir_key: str = "--task-dir"


def chosen_tasks(section: Evaluation) -> TaskChoice:
    """Return the tasks of `[evaluation]`."""
    return TaskChoice(
        section.tasks,
        section.task_dir,
        section.num_fewshot,
        section.limit,
        section.apply_chat_template,
        key="evaluation.tasks",
        dir_key="evaluation.task_dir",
    )


class Measure(NamedTuple):
    """One metric of a task, or of a group of tasks."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_examples: int | None


class Tasks:
    """Loaded tasks; made by `load_tasks`."""

    def __init__(self, choice: TaskChoice, loaded: Any):
        self._choice, self._loaded = choice, loaded

    @property
    def generating(self) -> list[str]:
        """Names of the tasks that generate text."""
        tasks = self._loaded["tasks"].items()
        return [name for name, task in tasks if task.OUTPUT_TYPE == GENERATES]

    def try_first(self, model: "HarnessModel") -> None:
        """Make the first request of each task. Raises ConfigError if that fails."""
        chat = self._chat(model)
        for name, task in self._loaded["tasks"].items():
            try:
                task.build_all_requests(limit=1, **chat)
            except ConfigError:
                raise
            except Exception as error:  # a task is a program
                problem = f"makes no request: {_text(error)}"
                raise ConfigError(ConfigIssue(self._choice.key, problem, _CORRECT, name)) from error

    def measure(self, model: "HarnessModel", with_errors: bool) -> tuple[list[Measure], Any]:
        """Return the metrics, and lm-eval's own report. All ranks must call it.

        `with_errors` estimates standard errors, which can take a while. Raises DataError, on all
        ranks, where a task fails on its documents or the model's answers.
        """
        os.environ["DISABLE_MULTIPROC"] = "1"  # a fork of this process would share its devices
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        report: Any = None
        failure: Exception | None = None
        model.is_answering = False
        with _kept_random_state():
            try:
                report = self._evaluate(model, with_errors)
            except Exception as error:  # a task is a program
                if model.is_answering:
                    raise
                failure = error
        model.require_same(type(failure).__name__)
        if failure is not None:
            name = _task_of(failure) or ",".join(self._choice.names)
            raise DataError(f"the task {name} fails: {_text(failure)}; {_CORRECT}") from failure
        return list(_measures(report)), report

    def _evaluate(self, model: "HarnessModel", with_errors: bool) -> Any:
        from lm_eval.evaluator import evaluate

        return evaluate(
            lm=model,
            task_dict=self._loaded,
            limit=self._choice.limit,
            bootstrap_iters=_RESAMPLES if with_errors else 0,
            log_samples=False,
            apply_chat_template=self._choice.apply_chat_template,
            fewshot_as_multiturn=self._choice.apply_chat_template,
        )

    def _chat(self, model: "HarnessModel") -> dict[str, Any]:
        if not self._choice.apply_chat_template:
            return {}
        return {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "chat_template": model.apply_chat_template,
            "tokenizer_name": model.tokenizer_name,
        }


def missing_package(key: str, value: Any) -> ConfigIssue | None:
    """Return the issue of a missing lm-eval, or None."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return None
    problem, fix = "needs the package lm-eval", "run `pip install -e '.[eval]'` in the clone"
    return ConfigIssue(key, problem, fix, value, missing_asset=True)


def load_tasks(choice: TaskChoice) -> Tasks:
    """Return the tasks with their data. Raises ConfigError, with all unknown names at once."""
    if (missing := missing_package(choice.key, ",".join(choice.names))) is not None:
        raise ConfigError(missing)
    import lm_eval.api.task

    lm_eval.api.task.tqdm = lambda items, **_: items  # else every rank shows a bar for each task
    if is_quiet_rank():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = find_tasks(choice)
    built, issues = list[Any](), list[ConfigIssue]()
    with _kept_random_state():
        for name in dict.fromkeys(choice.names):
            try:
                found = manager.load([name])
                for task_name, task in found["tasks"].items():
                    _prepare(choice, task_name, task)
            except ConfigError as error:
                issues += error.problems
            except Exception as error:  # a task is a program, and reads files and the hub
                problem = f"cannot be loaded: {_text(error)}"
                fix = _OFFLINE if isinstance(error, OSError) else _CORRECT
                issues.append(ConfigIssue(choice.key, problem, fix, name))
            else:
                groups = found.get("groups", {})
                built += [groups[name]] if name in groups else found["tasks"].values()
    if issues:
        raise ConfigError(issues)
    try:
        return Tasks(choice, manager.load(built))
    except ValueError as error:  # a task that is in two of the groups
        fix = "leave one of the two out"
        names = ",".join(choice.names)
        raise ConfigError(ConfigIssue(choice.key, str(error), fix, names)) from None


def find_tasks(choice: TaskChoice) -> Any:
    """Return lm-eval's index of tasks, in which all names are. Raises ConfigError.

    lm-eval's own thousands, which take seconds, are left out if all names are in the folder.
    """
    if choice.task_dir is not None:
        if not os.path.isdir(choice.task_dir):
            problem, fix = "is not a folder", "name a folder of lm-eval's YAML files"
            raise ConfigError(ConfigIssue(choice.dir_key, problem, fix, choice.task_dir))
        manager = _index(choice.task_dir, include_defaults=False)
        if set(choice.names) <= set(manager.all_tasks):
            return manager
    manager = _index(choice.task_dir, include_defaults=True)
    known = manager.all_tasks
    issues = []
    for name in choice.names:
        if name not in known:
            match = nearest(name, known)
            fix = f'did you mean "{match}"?' if match else "run `lm-eval ls tasks` for all names"
            issues.append(ConfigIssue(choice.key, "is not a task", fix, name))
    if issues:
        raise ConfigError([*issues, *_unreadable(choice.task_dir)])
    return manager


@cache
def _index(task_dir: str | None, include_defaults: bool) -> Any:
    """Read lm-eval's index once a process: a run's checks and its start both need it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_dir, include_defaults=include_defaults)


def _unreadable(task_dir: str | None) -> Iterator[ConfigIssue]:
    """Yield the YAML files of a folder that lm-eval passes over, as it cannot read them."""
    import yaml

    for file in [] if task_dir is None else sorted(Path(task_dir).glob("**/*.yaml")):
        try:
            list(yaml.parse(file.read_text(encoding="utf-8")))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            yield ConfigIssue(str(file), f"is not readable YAML: {text}", "correct it")


def _prepare(choice: TaskChoice, name: str, task: Any) -> None:
    """Set the number of examples in a prompt, as lm-eval does. Raises ConfigError."""
    for attribute, problem in (
        ("UNSAFE_CODE", "runs code that the model writes"),
        ("MULTIMODAL", "needs a model of images or sound"),
    ):
        if getattr(task, attribute, False):
            raise ConfigError(ConfigIssue(choice.key, problem, "leave it out", name))
    given, own = choice.num_fewshot, task.get_config("num_fewshot")
    if given is not None and own != 0:  # 0 in a task's file means that it can have none
        task.set_config(key="num_fewshot", value=given)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _measures(report: Mapping[str, Any]) -> Iterator[Measure]:
    for task, values in {**report["results"], **report.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, of_filter = key.partition(",")
            if not of_filter or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{metric}_stderr,{of_filter}")
            shown = metric if of_filter == "none" else f"{metric}/{of_filter}"
            count = report["n-samples"].get(task, {}).get("effective")
            known = _is_number(error) and not math.isnan(error)
            yield Measure(task, shown, float(value), float(error) if known else None, count)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _task_of(error: Exception) -> str | None:
    """Return the name of the task whose method raised the error; None outside of methods."""
    from lm_eval.api.task import Task

    frames = traceback.walk_tb(error.__traceback__)
    owners = (frame.f_locals.get("self") for frame, _ in frames)
    return next((str(owner.task_name) for owner in owners if isinstance(owner, Task)), None)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
