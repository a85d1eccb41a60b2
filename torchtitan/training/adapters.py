"""A step that holds adapters, as other programs read it: merged into its base, or alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan.checkpoint.base import digest_here, digest_of_manifest
from torchtitan.checkpoint.base_place import (
    NOT_MOVED,
    MovedBase,
    missing_base,
    place_of_base,
    require_same_base,
)
from torchtitan.checkpoint.initial_load import added_to_base
from torchtitan.checkpoint.manifest import InvalidCheckpoint, base_of
from torchtitan.checkpoint.model_folder import ModelFolder, read_model_folder
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.schema import Model
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.conversion import convert_model
from torchtitan.handlers.named import NamedHandler
from torchtitan.handlers.registry import changes_model
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily, require_language_model
from torchtitan.models.registry import get_family
from torchtitan.training.open_model import (
    config_of_step,
    decoder_args,
    holds_adapters,
    record_of_training,
    verify_files,
    with_window,
)
from torchtitan.training.pretrained import newest_step, require_cached_masks
from torchtitan.training.pretrained_config import tokenizer_of_step
from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.remote import is_remote
from torchtitan.weights.made_tensors import MadeTensors
from torchtitan.weights.readback import logits_of
from torchtitan.weights.recognise import FOREIGN, InvalidWeights, kind_of
from torchtitan.weights.remote import download_once
from torchtitan.weights.source import open_weights
from torchtitan.weights.stored_model import StoredModel, Weights, empty, load

MadeByName = Mapping[str, MadeTensors]

_IN = "IN"
_EMBEDDING = "tok_embeddings.weight"


@dataclass(frozen=True)
class AdaptedModel:
    """Adapters, the handler that made them, and the base, which is verified."""

    model: StoredModel
    """The adapters; its tokenizer and record are those of the run."""
    base: StoredModel
    handler: NamedHandler

    def logits(self, tokens: Tensor, adapters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits `[B, T, V]` of the base with its own, or other, `adapters`."""
        own, others = self.model.weights, self.base.weights

        def fill(tensors: Mapping[str, Tensor]) -> None:
            added = {name: tensor for name, tensor in tensors.items() if name in own.tensors}
            if adapters is None:
                load(own, added)
            else:
                for name, tensor in added.items():
                    tensor.copy_(adapters[name])
            rest = {name: t for name, t in tensors.items() if name not in added}
            for name, made in self.handler.made_of(rest).items():
                weight = made.allocate()
                load(others, {name: weight})
                made.store(weight)
                rest = {key: tensor for key, tensor in rest.items() if key not in made.names}
            load(others, rest)

        def convert(model: Any) -> None:
            convert_model(model, [self.handler], torch.float32)
            model.float()

        return logits_of(self.base.family, self.base.args, fill, tokens, convert)

    def merged(self, dtype: str | None) -> StoredModel:
        """Return the merged model; adapted weights have `dtype`, by default the base's type."""
        weights = _MergedWeights(self, dtype)
        return replace(self.model, weights=weights, reference=self.logits)


class _MergedWeights:
    """The base's weights, with adapters merged into them as they are read."""

    def __init__(self, adapted: AdaptedModel, dtype: str | None):
        self._base, self._own = adapted.base.weights, adapted.model.weights
        self._handler = adapted.handler.handler
        added: dict[str, list[str]] = {}
        for name in self._own.tensors:
            added.setdefault(f"{name.rpartition('.')[0]}.weight", []).append(name)
        self._added = added
        self.tensors: dict[str, dict[str, Any]] = {
            name: entry | ({"dtype": dtype} if dtype is not None and name in added else {})
            for name, entry in self._base.tensors.items()
        }
        """See `Weights`."""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Weights`; merges in at least float32."""
        plain = {name: t for name, t in tensors.items() if name not in self._added}
        if plain:
            self._base.load(plain)
        for name in tensors.keys() - plain.keys():
            wide = at_least_float32(tensors[name].dtype)
            weight = torch.empty(self.tensors[name]["shape"], dtype=wide)
            self._base.load({name: weight})
            added = {
                key: torch.empty(self._own.tensors[key]["shape"], dtype=wide)
                for key in self._added[name]
            }
            self._own.load(added)
            by_last_name = {key.rpartition(".")[2]: tensor for key, tensor in added.items()}
            tensors[name].copy_(self._handler.merge_added(name, weight, by_last_name))


class _Part:
    """The tensors of a step that are, or are not, the adapters'; made ones as their matrices."""

    def __init__(self, folder: ModelFolder, names: Collection[str], made: MadeByName):
        self._folder, self._made = folder, made
        self.tensors: dict[str, dict[str, Any]] = {name: folder.tensors[name] for name in names}
        """See `Weights`."""
        for name, each in made.items():
            dtype = folder.tensors[each.names[-1]]["dtype"]
            self.tensors[name] = {"dtype": dtype, "shape": list(each.shape)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Weights`."""
        plain = {name: tensor for name, tensor in tensors.items() if name not in self._made}
        if plain:
            self._folder.load(plain)
        for name in tensors.keys() - plain.keys():
            stored = {part: self._folder.tensors[part] for part in self._made[name].names}
            parts = {part: empty(entry) for part, entry in stored.items()}
            self._folder.load(parts)
            dtype = at_least_float32(tensors[name].dtype)
            tensors[name].copy_(self._made[name].restore(list(parts.values()), dtype))


def open_adapted(
    path: Path, tokenizer_path: str | None = None, moved: MovedBase = NOT_MOVED
) -> AdaptedModel:
    """Open a step with adapters, or the newest of a run, and verify its files and its base.

    Raises ConfigError for a checkpoint without adapters, CheckpointError for damage and for a base
    that is missing or changed.
    """
    path = newest_step(path) or path
    if not path.exists():
        raise ConfigError(ConfigIssue(_IN, "does not exist", "name a step", str(path)))
    try:
        folder = read_model_folder(path) if kind_of(path) == "step" else None
        if folder is not None and folder.manifest is not None:
            config_of_step(folder.manifest)  # imports handlers
        if folder is None or not holds_adapters(folder.manifest):
            text = "holds no adapters: it is a whole model, or one that is merged already"
            fix = "leave out --adapter and --merge, or name a step of a run with adapters"
            raise ConfigError(ConfigIssue(_IN, text, fix, str(path)))
        return _open(path, folder, tokenizer_path, moved)
    except (InvalidWeights, InvalidCheckpoint) as error:
        raise CheckpointError(str(error)) from error


def _open(
    path: Path, folder: ModelFolder, tokenizer_path: str | None, moved: MovedBase
) -> AdaptedModel:
    manifest = folder.manifest
    assert manifest is not None
    verify_files(path, manifest)
    config = config_of_step(manifest)
    require_cached_masks(config)
    handler = _handler_of(config)
    family, recorded = get_family(config.model.name), base_of(manifest)
    tokenizer, training = tokenizer_path or tokenizer_of_step(path), record_of_training(manifest)
    if recorded is None:
        args = with_window(config, _args_of(folder, config.model, family))
        own, base = _split(folder, family, args, handler)
        model = StoredModel(path, family, args, own, tokenizer, training)
        return AdaptedModel(model, replace(model, weights=base), handler)
    found = place_of_base(recorded, moved)
    if found is None:
        raise missing_base(recorded, moved)
    place = download_once(found) if is_remote(found) else Path(found).resolve()
    base, args, digest = _open_base(place, config.model, family)
    require_same_base(recorded, place, digest, moved)
    model = StoredModel(path, family, with_window(config, args), folder, tokenizer, training)
    return AdaptedModel(model, replace(model, path=place, weights=base), handler)


def _handler_of(config: JobConfig) -> NamedHandler:
    """Return the handler that made a step's adapters. Raises ConfigError if there were others."""
    names = changes_model(config.model.handlers)
    handlers = [NamedHandler(name, config, ParallelDims()) for name in names]
    if len(handlers) != 1 or not handlers[0].adds_adapters:
        problem = f"was trained with {', '.join(names)}, and only adapters can be exported"
        fix = "convert it to a .pt file instead, which holds its tensors as they are"
        raise ConfigError(ConfigIssue("model.handlers", problem, fix))
    return handlers[0]


def _split(
    folder: ModelFolder, family: ModelFamily, args: DecoderArgs, handler: NamedHandler
) -> tuple[Weights, Weights]:
    """Return the adapters of a whole step, and the base that it holds itself."""
    with torch.device("meta"):
        model = family.build(args)
    require_language_model(model, family.name)
    convert_model(model, [handler], torch.float32)
    parameters = dict(model.named_parameters())
    added, made = added_to_base(parameters, [handler]), handler.made_of(parameters)
    parts = {name for each in made.values() for name in each.names}
    rest = [name for name in folder.tensors if name not in added | parts]
    return _Part(folder, added, {}), _Part(folder, rest, made)


def _open_base(
    place: Path, section: Model, family: ModelFamily
) -> tuple[Weights, DecoderArgs, str]:
    """Return the base's weights, its hyper-parameters, and a digest of its files."""
    if kind_of(place) in FOREIGN:
        # Any size of the vocabulary opens it; the files know the right one.
        source = open_weights(place, family, decoder_args(family, family.resolve(section, 1)))
        rows = source.tensors[_EMBEDDING]["shape"][0]
        args = decoder_args(family, family.resolve(section, rows))
        source = open_weights(place, family, args, "vocab_size" in section.args)
        return source, args, digest_here(source.files)
    folder = read_model_folder(place)
    args = _args_of(folder, section, family)
    if folder.manifest is None:
        return folder, args, digest_here(folder.files)
    verify_files(place, folder.manifest)
    digest = digest_of_manifest(folder.manifest)
    if holds_adapters(folder.manifest):  # a whole step, whose adapters were the start of these
        handler = _handler_of(config_of_step(folder.manifest))
        return _split(folder, family, args, handler)[1], args, digest
    return folder, args, digest


def _args_of(folder: ModelFolder, section: Model, family: ModelFamily) -> DecoderArgs:
    rows = folder.tensors[_EMBEDDING]["shape"][0]
    return decoder_args(family, family.resolve(section, rows))
