"""Names that are not known: what was probably meant."""

import difflib
from collections.abc import Iterable

from torchtitan.config.errors import Problem
from torchtitan.config.fields import known_keys, known_sections
from torchtitan.utils.redaction import names_a_secret

CUTOFF = 0.6

RENAMED = {
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "compile.enable": 'model.handlers = ["compile"]',
    "experimental.custom_import": "job.custom_import",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "model.converters": "model.handlers",
    "model.hf_assets_path": "model.tokenizer_path",
    "optimizer.fused": 'optimizer.implementation = "fused"',
    "training.batch_size": "training.local_batch_size",
    "training.compile": 'model.handlers = ["compile"]',
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.deterministic": "debug.deterministic",
    "training.seed": "debug.seed",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
}
"""TorchTitan's names that are spelt differently here."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, if any is alike enough to be what was meant."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=CUTOFF)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The fix for a name that is none of the candidates."""
    candidates = list(candidates)
    match = nearest(name, candidates)
    choices = f"choose from {', '.join(candidates)}" if candidates else "there is none to choose"
    return f'did you mean "{match}"? Otherwise {choices}' if match else choices


def secret_problem(key: str) -> Problem:
    """A token in the config: it would be stored with the run, and shown by `ps` to everyone."""
    return Problem(
        key,
        "looks like a secret; configs are stored with the run and command lines are public",
        "remove it here, and set HF_TOKEN (or the service's own variable) in the environment",
    )


def unknown_key(shown: str, name: str, *, from_command_line: bool = False) -> Problem:
    """The problem of a dotted key that no section has; `shown` is how the user wrote it."""
    if names_a_secret(name):
        return secret_problem(shown)
    dashes = "--" if from_command_line else ""
    if name in RENAMED:
        return Problem(shown, "has another name here", f"write `{dashes}{RENAMED[name]}`")
    section, _, last = name.rpartition(".")
    homes = [key for key in known_keys().values() if key.last_name == last]
    if homes:
        places = " or ".join(f"`{dashes}{key.name}`" for key in homes)
        belongs = " or ".join(f"[{key.section}]" for key in homes)
        return Problem(shown, f"belongs in section {belongs}", f"write {places}")
    if section in known_sections():
        keys = [key.last_name for key in known_keys().values() if key.section == section]
        keys += [s.rpartition(".")[2] for s in known_sections() if s.rpartition(".")[0] == section]
        keys = sorted(set(keys))
        match = nearest(last, keys)
        prefix = f"did you mean `{dashes}{section}.{match}`? " if match else ""
        return Problem(shown, "is unknown", f"{prefix}Keys of [{section}]: {', '.join(keys)}")
    match = nearest(name, known_keys())
    if match:
        return Problem(shown, "is unknown", f"did you mean `{dashes}{match}`?")
    return Problem(shown, "is unknown", f"the sections are {_sections()}")


def unknown_section(name: str) -> Problem:
    """The problem of a table, or of a key at the top level, that is not a section."""
    if names_a_secret(name):
        return unknown_key(name, name)
    match = nearest(name, known_sections())
    prefix = f"did you mean [{match}]? " if match else ""
    return Problem(name, "is not a section", f"{prefix}The sections are {_sections()}")


def _sections() -> str:
    return ", ".join(f"[{name}]" for name in known_sections())
