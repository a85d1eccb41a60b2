"""Check that the model is the one whose weights a new run starts from."""

from pathlib import Path

from torchtitan.checkpoint.decision import decide
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.models.family import FROM_CHECKPOINT
from torchtitan.models.registry import get_family
from torchtitan.utils.remote import is_remote
from torchtitan.weights.description import (
    ModelDescription,
    describe_model,
    differences,
    same_architecture,
)
from torchtitan.weights.recognise import kind_of
from torchtitan.weights.remote import download

_FIX = 'set model.flavor = "from_checkpoint", or the flavor and model.args of the checkpoint'
VOCABULARY = "model.args.vocab_size"


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Compare hyper-parameters with those of `checkpoint.initial_load_path`, for a new run.

    What `model.args` sets may differ: it is meant to. Other checks compare shapes.
    """
    config = context.config
    given = config.checkpoint.initial_load_path
    if given is None or not config.checkpoint.enable:
        return []
    try:
        if decide(config, context, Path(config.job.dump_folder).resolve()).action != "new":
            return []
        path = download(given, with_weights=False) if is_remote(given) else Path(given)
        if kind_of(path) in (None, "dcp", "torch"):
            return []
        description = describe_model(path)
    except (ConfigError, OSError) as error:
        # Whoever looks at the folder itself reports what is wrong with it.
        return error.problems if isinstance(error, ConfigError) and _is_of_file(error) else []
    return [*_differences(context, description), *_vocabulary(context, description)]


def _is_of_file(error: ConfigError) -> bool:
    """Return whether an error is about a field of the checkpoint's config."""
    return any(".json" in problem.key or ".gguf" in problem.key for problem in error.problems)


def _differences(context: RunContext, description: ModelDescription) -> list[ConfigIssue]:
    section = context.config.model
    family = get_family(section.name)
    if section.flavor == FROM_CHECKPOINT:
        return []
    if not same_architecture(family, get_family(description.family)):
        text = f"the model in {description.source} is {description.family}"
        return [ConfigIssue("model.name", text, _FIX, section.name)]
    ours = family.resolve(section)
    found = differences(ours, description.resolved())
    rows = [
        (name, *map(str, both))
        for name, both in found.items()
        if name not in section.args and (name != "vocab_size" or None not in both)
    ]
    if not rows:
        return []
    rows.insert(0, ("model.args", "the flavor", "the checkpoint"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"    {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    table = "\n".join(lines)
    text = f"is not the model of {description.source}:\n{table}\nso the weights are not for it"
    return [ConfigIssue("model.flavor", text, _FIX, section.flavor)]


def _vocabulary(context: RunContext, description: ModelDescription) -> list[ConfigIssue]:
    """Return problems of a vocabulary that `model.args` sets to another size."""
    wanted = context.config.model.args.get("vocab_size")
    rows = description.args.get("vocab_size")
    if not isinstance(wanted, int) or rows is None or wanted == rows:
        return []
    if wanted < rows:
        text = f"less than the {rows} tokens of the checkpoint"
        fix = f"set it to {rows}, or to more to add tokens, or leave it out"
        return [ConfigIssue(VOCABULARY, text, fix, wanted)]
    text = (
        f"adds {wanted - rows} rows of zeros to the {rows} of the checkpoint's embedding and head"
    )
    return [ConfigIssue(VOCABULARY, text, f"set {rows} to add none", wanted, severity="warning")]
