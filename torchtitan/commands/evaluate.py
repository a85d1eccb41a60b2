"""`torchtitan evaluate`: any checkpoint on the tasks of lm-eval."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from torchtitan.commands.printing import json_values
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.utils.host import prepare_host

if TYPE_CHECKING:
    from torchtitan.commands.model_session import ModelSession
    from torchtitan.data.chat_template import ChatTemplate
    from torchtitan.evaluation.harness import HarnessModel
    from torchtitan.evaluation.tasks import Measure
    from torchtitan.training.pretrained import Pretrained


def run(options: argparse.Namespace) -> int:
    """Check everything that needs no weights, then measure; exit status 0."""
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError(ConfigIssue("--tasks", "names no task", "name one", options.tasks))
    prepare_host()
    from torchtitan.commands import model_session
    from torchtitan.data.chat_template import read_chat_template
    from torchtitan.evaluation.tasks import TaskChoice, load_tasks

    place, found = model_session.look_at(options)
    template = read_chat_template(found.folders) if options.apply_chat_template else None
    choice = TaskChoice(
        names,
        None if options.task_dir is None else expand_path(options.task_dir),
        options.num_fewshot,
        options.limit,
        options.apply_chat_template,
    )
    tasks = load_tasks(choice)
    with model_session.open_session(options, found, place) as session:
        model = harness_model(session, found, options.batch_size, template)
        tasks.try_first(model)
        measures, report = tasks.measure(model, with_errors=True)
        if session.world.is_main:
            print(_table(measures))
            if options.output is not None:
                _write(expand_path(options.output), options, measures, report)
    return DONE


def harness_model(
    session: ModelSession, found: Pretrained, batch_size: int, template: ChatTemplate | None
) -> HarnessModel:
    """Return the opened model as lm-eval sees it."""
    from torchtitan.evaluation.harness import HarnessModel
    from torchtitan.evaluation.scoring import Place, Scorer
    from torchtitan.loss.cross_entropy import CrossEntropyLoss
    from torchtitan.loss.vocab_parallel import VocabShard
    from torchtitan.parallel.runner import SPMDRunner

    world, dims = session.world, session.dims
    shard = None
    if dims.tp > 1:
        assert found.args.vocab_size is not None
        shard = VocabShard(found.args.vocab_size, session.mesh["tp"].get_group())
    runner = SPMDRunner(
        session.model,
        CrossEntropyLoss(),
        world.device,
        ("tokens", "positions"),
        is_loss_leader=dims.is_loss_leader(world.rank),
    )
    place = Place(world, dims, batch_size, found.args.max_seq_len)
    return HarnessModel(
        Scorer(runner, place, shard),
        place,
        found.tokenizer,
        generator=session.generator,
        eos_ids=found.eos_ids,
        template=template,
    )


def _table(measures: list[Measure]) -> str:
    rows = [("task", "metric", "value", "stderr", "examples")]
    for measure in measures:
        error = "" if measure.stderr is None else f"{measure.stderr:.4f}"
        count = "" if measure.num_examples is None else f"{measure.num_examples:,}"
        rows.append((measure.task, measure.metric, f"{measure.value:.4f}", error, count))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for task, metric, *figures in rows:
        names = [task.ljust(widths[0]), metric.ljust(widths[1])]
        numbers = [text.rjust(width) for text, width in zip(figures, widths[2:], strict=True)]
        lines.append("  ".join([*names, *numbers]).rstrip())
    return "\n".join(lines)


def _write(
    path: str, options: argparse.Namespace, measures: list[Measure], report: dict[str, Any]
) -> None:
    content = {
        "checkpoint": options.checkpoint,
        "results": json_values([measure._asdict() for measure in measures]),
        "num_fewshot": report["n-shot"],
        "versions": report["versions"],
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template,
    }
    with open(path, "x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
    print(f"wrote {path}", file=sys.stderr)
