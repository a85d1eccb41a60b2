"""Check that the weights of `checkpoint.initial_load_path` fit the model, by names and shapes.

A vocabulary size that comes from the tokenizer is not compared.
"""

from pathlib import Path
from typing import Any

from torchtitan.checkpoint.decision import decide
from torchtitan.checkpoint.initial import initial_path
from torchtitan.checkpoint.manifest import InvalidCheckpoint, tensor_differences
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import get_family

_KEY = "checkpoint.initial_load_path"
_STAND_IN_VOCAB_SIZE = 1_000_003
_HARMLESS_HANDLERS = {"compile"}
"""Handlers that add no parameters."""


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Compare the model with the weights that a new run starts from; imports torch.

    Returns nothing for a config with errors in other sections.
    """
    config, section = context.config, context.config.checkpoint
    if not section.enable or section.initial_load_path is None:
        return []
    if set(config.model.handlers) - _HARMLESS_HANDLERS:
        return []
    try:
        dump_folder = Path(config.job.dump_folder).resolve()
        if decide(config, context, dump_folder).action != "new":
            return []
        family = get_family(config.model.name)
        args = family.resolve(config.model)
    except (ConfigError, OSError):
        return []
    if args.vocab_size is None:
        args = args.model_copy(update={"vocab_size": _STAND_IN_VOCAB_SIZE})
    import torch

    from torchtitan.checkpoint.dcp_io import describe_tensor
    from torchtitan.checkpoint.model_folder import read_model_folder
    from torchtitan.checkpoint.state import model_tensors

    with torch.device("meta"):
        model = family.build(args)
    wanted = {name: describe_tensor(tensor) for name, tensor in model_tensors([model]).items()}
    path = initial_path(section)
    try:
        stored = read_model_folder(path).tensors
    except InvalidCheckpoint as error:
        fix = "choose another checkpoint"
        return [ConfigIssue(_KEY, f"is damaged ({error})", fix, section.initial_load_path)]
    comparable = {name: _comparable(entry, stored.get(name)) for name, entry in wanted.items()}
    differences = tensor_differences(stored, [comparable])
    if not differences:
        return []
    fix = "choose another checkpoint, or the flavor and model.args of the run that saved it"
    return [
        ConfigIssue(_KEY, f"does not fit the model: {differences}", fix, section.initial_load_path)
    ]


def _comparable(wanted: dict[str, Any], stored: dict[str, Any] | None) -> dict[str, Any]:
    """Return `wanted` with the stored type, which a load converts, and unknown sizes as stored."""
    if stored is None or len(stored["shape"]) != len(wanted["shape"]):
        return wanted
    shape = [
        known if size == _STAND_IN_VOCAB_SIZE else size
        for size, known in zip(wanted["shape"], stored["shape"])
    ]
    return {"dtype": stored["dtype"], "shape": shape}
