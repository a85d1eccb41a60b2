"""The hyper-parameters of a stored model, in this library's terms. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.paths import hub_hint
from torchtitan.config.schema import Model
from torchtitan.config.value_errors import problems_of_table
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.weights.recognise import (
    META_PARAMS,
    InvalidWeights,
    UnreadableDescription,
    gguf_file,
    kind_of,
    read_json_object,
)

KEY = "checkpoint.initial_load_path"
_WIDTH_RULE = ("ffn_dim_multiplier", "multiple_of")
"""Hyper-parameters that `ffn_dim` follows from where it is unset."""


@dataclass(frozen=True)
class ModelDescription:
    """The family and complete hyper-parameters of a stored model, read from the file `source`.

    A `vocab_size` that is missing is the tokenizer's. `notices`: sentences about what was read and
    has no effect here.
    """

    family: str
    args: dict[str, Any]
    source: str
    notices: tuple[str, ...] = ()

    def resolved(self) -> ModelArgs:
        """Return the hyper-parameters as the family's class."""
        return get_family(self.family).args_type(**self.args)


def describe_model(path: Path) -> ModelDescription:
    """Return the hyper-parameters of the model at `path`: a folder, or a GGUF file.

    Raises `ConfigError` naming every field that this library does not support.
    """
    from torchtitan.weights.gguf_metadata import describe_gguf
    from torchtitan.weights.hf_config import from_hf_config
    from torchtitan.weights.meta_params import from_meta_params

    if not path.exists():
        fix = f"{hub_hint(str(path))}name a checkpoint"
        raise ConfigError(ConfigIssue(KEY, "does not exist", fix, str(path), missing_asset=True))
    kind = kind_of(path)
    if kind == "gguf":
        try:
            return describe_gguf(gguf_file(path))
        except InvalidWeights as error:
            raise ConfigError(ConfigIssue(KEY, str(error), "name one file", str(path))) from error
    config, params = path / "config.json", path / META_PARAMS
    if kind == "hf" or (kind == "torch" and config.is_file()):
        return from_hf_config(_table(config), str(config))
    if kind == "meta":
        return from_meta_params(_table(params), str(params))
    section = stored_model(path) if kind == "step" else None
    if section is None:
        text = "holds no hyper-parameters: no config.json, params.json, GGUF or step of a run"
        fix = "choose model.name and model.flavor, with model.args if needed"
        raise ConfigError(ConfigIssue(KEY, text, fix, str(path)))
    family = get_family(section.name)
    return complete(family, family.resolve(section).model_dump(), str(path / "manifest.json"))


def stored_model(step: Path) -> Model | None:
    """Return the section `[model]` that a step of this library was saved with, if it has one.

    The manifest's digest is not verified: whoever loads weights does that.
    """
    config = _table(step / "manifest.json").get("info", {}).get("config") or {}
    stored = config.get("model")
    try:
        return None if stored is None else Model.model_validate(stored)
    except ValidationError as error:
        problems = problems_of_table(error, f"{step / 'manifest.json'}: model", Model)
        raise ConfigError(problems) from None


def _table(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except InvalidWeights as error:
        text, fix = str(error).removeprefix(f"{file}: "), "get the file again"
        raise UnreadableDescription(ConfigIssue(str(file), text, fix)) from error


def complete(
    family: ModelFamily,
    values: Mapping[str, Any],
    source: str,
    notices: tuple[str, ...] = (),
    names: Mapping[str, str] = MappingProxyType({}),
) -> ModelDescription:
    """Return the description with the defaults of the family's class filled in.

    `names`: what `source` calls our hyper-parameters. Raises `ConfigError` for values that are out
    of range or do not fit together.
    """
    known = {name: value for name, value in values.items() if value is not None}
    try:
        args = family.args_type(**known)
        problems = args.problems()
    except ValidationError as error:
        problems = problems_of_table(error, source, family.args_type)
    if problems:
        ours = [problem.key.rpartition(".")[2] for problem in problems]
        fix = "correct the file, or get it again"
        raise ConfigError(
            [
                replace(problem, key=f"{source}: {names.get(name, name)}", fix=fix)
                for name, problem in zip(ours, problems)
            ]
        )
    dumped = args.model_dump(exclude_none=True)
    if isinstance(args, DecoderArgs):
        dumped["n_kv_heads"] = args.num_kv_heads
        if args.ffn_dim is not None:  # what else gives a width has no say
            dumped = {k: v for k, v in dumped.items() if k not in _WIDTH_RULE}
    return ModelDescription(family.name, dumped, source, notices)


def effective(args: ModelArgs) -> dict[str, Any]:
    """Return the values that a model's result depends on, with what is left open resolved."""
    values = args.model_dump(exclude={"max_seq_len", *_WIDTH_RULE})
    if isinstance(args, DecoderArgs):
        values |= {
            "n_kv_heads": args.num_kv_heads,
            "head_dim": args.head_size(),
            "ffn_dim": args.ffn_hidden_dim,
            "norm_type": args.norm_type.removeprefix("fused_"),
        }
        values = {
            name: value
            for name, value in values.items()
            if not name.startswith("rope_") or name == "rope_theta"
        } | args.rope_scaling()
        if "rope_attention_factor" in values:
            values["rope_attention_factor"] = args.attention_factor
    return values


def differences(ours: ModelArgs, theirs: ModelArgs) -> dict[str, tuple[Any, Any]]:
    """Return the values that make two models compute different things, by name."""
    left, right = effective(ours), effective(theirs)
    return {
        name: (left.get(name), right.get(name))
        for name in [*left, *(name for name in right if name not in left)]
        if left.get(name) != right.get(name)
    }


def same_architecture(one: ModelFamily, other: ModelFamily) -> bool:
    """Return whether two families differ only in their sizes, as Llama 2 and 3 do."""
    return (one.args_type, one.build, one.hf_weights) == (
        other.args_type,
        other.build,
        other.hf_weights,
    )
