"""Tasks of lm-eval by name: loaded and checked before anything runs, then measured.

lm-eval, and torch, are imported where they are used. Tasks draw solved examples from generators of
their own; the state of the global ones, which some use, is put back.
"""

import importlib.util
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchtitan.config.errors import ConfigError, ConfigIssue
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
_OFFLINE = (
    "correct its file; or, if its data are on the hub, run once where that can be reached, or give"
    " local files as `dataset_path: json`, `dataset_kwargs: {data_files: ...}`"
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
                raise self._cannot(name, error, "correct its file") from error

    def measure(self, model: "HarnessModel", with_errors: bool) -> tuple[list[Measure], Any]:
        """Return the metrics, and lm-eval's own report. All ranks must call it.

        `with_errors` estimates standard errors, which can take a while.
        """
        from lm_eval.evaluator import evaluate

        os.environ["DISABLE_MULTIPROC"] = "1"  # a fork of this process would share its devices
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        with _kept_random_state():
            report = evaluate(
                lm=model,
                task_dict=self._loaded,
                limit=self._choice.limit,
                bootstrap_iters=_RESAMPLES if with_errors else 0,
                log_samples=False,
                apply_chat_template=self._choice.apply_chat_template,
                fewshot_as_multiturn=self._choice.apply_chat_template,
            )
        assert report is not None
        return list(_measures(report)), report

    def _chat(self, model: "HarnessModel") -> dict[str, Any]:
        if not self._choice.apply_chat_template:
            return {}
        return {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "chat_template": model.apply_chat_template,
            "tokenizer_name": model.tokenizer_name,
        }

    def _cannot(self, name: str, error: Exception, fix: str) -> ConfigError:
        problem = f"makes no request: {type(error).__name__}: {error}"
        return ConfigError(ConfigIssue(self._choice.key, problem, fix, name))


def missing_package(key: str, value: Any) -> ConfigIssue | None:
    """Return the issue of a missing lm-eval, or None."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return None
    problem, fix = "needs the package lm-eval", "run `pip install 'torchtitan[eval]'`"
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
    with _kept_random_state():
        try:
            loaded = manager.load(list(dict.fromkeys(choice.names)))
            for name, task in loaded["tasks"].items():
                _prepare(choice, name, task)
        except ConfigError:
            raise
        except Exception as error:  # a task is a program, and reads files and the hub
            problem = f"cannot be loaded: {type(error).__name__}: {error}"
            names = ",".join(choice.names)
            raise ConfigError(ConfigIssue(choice.key, problem, _OFFLINE, names)) from error
    return Tasks(choice, loaded)


def find_tasks(choice: TaskChoice) -> Any:
    """Return lm-eval's index of tasks, in which all names are. Raises ConfigError.

    lm-eval's own thousands, which take seconds, are left out if all names are in the folder.
    """
    from lm_eval.tasks import TaskManager

    if choice.task_dir is not None:
        if not os.path.isdir(choice.task_dir):
            problem, fix = "is not a folder", "name a folder of lm-eval's YAML files"
            raise ConfigError(ConfigIssue(choice.dir_key, problem, fix, choice.task_dir))
        manager = TaskManager(include_path=choice.task_dir, include_defaults=False)
        if set(choice.names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=choice.task_dir)
    known = manager.all_tasks
    issues = []
    for name in choice.names:
        if name not in known:
            match = nearest(name, known)
            fix = f'did you mean "{match}"?' if match else "run `lm-eval ls tasks` for all names"
            issues.append(ConfigIssue(choice.key, "is not a task", fix, name))
    if issues:
        raise ConfigError(issues)
    return manager


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
            yield Measure(
                task, shown, float(value), float(error) if _is_number(error) else None, count
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not math.isnan(float(value))


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
