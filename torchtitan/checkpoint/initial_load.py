"""Load the checkpoint that a new run starts from; see `initial`."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from torchtitan.checkpoint.base import digest_of_files, digest_of_manifest
from torchtitan.checkpoint.base_place import (
    NOT_MOVED,
    MovedBase,
    missing_base,
    place_of_base,
    require_same_base,
)
from torchtitan.checkpoint.collective import describe_on_all_ranks, run_on_all_ranks, run_on_rank0
from torchtitan.checkpoint.config_diff import stored_value
from torchtitan.checkpoint.initial import initial_path, without_excluded
from torchtitan.checkpoint.manifest import (
    Manifest,
    base_of,
    manifest_from_json,
    manifest_to_json,
    select_tensors,
    tensor_differences,
    verify_share,
)
from torchtitan.checkpoint.model_folder import ModelFolder, read_model_folder
from torchtitan.config import CheckpointError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.utils.remote import is_remote
from torchtitan.utils.text import plural
from torchtitan.weights.made_tensors import MadeTensors
from torchtitan.weights.recognise import FOREIGN, InvalidWeights, kind_of
from torchtitan.weights.remote import download_once, place_of
from torchtitan.weights.source import WeightSource

logger = logging.getLogger(__name__)

_LOADED_AT_ONCE = 1 << 28
"""Elements of whole matrices: 1 GiB over all ranks."""
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class ChangesWeights(Protocol):
    """The part of a model handler that concerns weights."""

    name: str
    added: frozenset[str]
    """Names of the parameters and buffers that it has added to the model."""

    @property
    def adds_adapters(self) -> bool:
        """Return whether checkpoints leave out what is not trained."""

    def transform_loaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a replacement for this rank's part of a weight, or the part itself."""

    def made_of(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, MadeTensors]:
        """Return the tensors that are made of a stored matrix, by its name."""


class InitialLoad:
    """The checkpoint of `checkpoint.initial_load_path`, verified if it has a manifest.

    `open_foreign` opens weights of Hugging Face, Meta or GGUF for the run's model. A checkpoint
    that refers to a base is loaded together with it, which may have `moved`. All ranks construct it
    and call every method.
    """

    def __init__(
        self,
        section: Checkpoint,
        world: DistributedContext,
        open_foreign: Callable[[Path], WeightSource] | None = None,
        moved: MovedBase = NOT_MOVED,
    ):
        self._world = world
        self._model_only = section.initial_load_model_only
        self._excluded = section.exclude_from_loading
        path = initial_path(section)
        self._what = f"{path} cannot be loaded"
        self._digest: str | None = None
        self._base: InitialLoad | None = None
        self._folder: ModelFolder | WeightSource
        if open_foreign is not None and kind_of(path) in FOREIGN:
            commit = run_on_rank0(world, self._what, lambda: _commit(path))
            self._folder = run_on_all_ranks(
                world, self._what, lambda: open_foreign(_require_commit(path, commit))
            )
            return
        self._folder = self._open(path)
        manifest = self._manifest
        if manifest is None:
            logger.warning("%s has no manifest, so damage would not be noticed.", path)
        else:
            run_on_all_ranks(
                world,
                self._what,
                lambda: verify_share(path, manifest, world.rank, world.world_size),
            )
            self._base = open_base(section, manifest, world, open_foreign, moved)

    def base_record(self) -> dict[str, str]:
        """Return path and digest of the weights without adapters: these, or their own base.

        `hub` is their `hf://owner/name@commit`, if they lie in the hub's cache. Reads all files
        unless a manifest has their digests. Collective.
        """
        if self._base is not None:
            return self._base.base_record()
        if self._digest is None and self._manifest is not None:
            self._digest = digest_of_manifest(self._manifest)
        elif self._digest is None:
            self._digest = digest_of_files(self._world, self._what, self._folder.files)
        record = {"path": str(self._folder.path), "digest": self._digest}
        hub_path = place_of(self._folder.path)
        return record if hub_path is None else record | {"hub": hub_path}

    def holds_any(self, names: Collection[str]) -> bool:
        """Return whether it has a tensor of one of these names, not counting its base."""
        return any(name in self._folder.tensors for name in names)

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state to continue from; empty if only weights are taken."""
        manifest = self._manifest
        if self._model_only or manifest is None:
            return {}
        return without_excluded(manifest.state, self._excluded)

    @property
    def whole_run(self) -> tuple[Path, Manifest] | None:
        """The folder and its manifest without excluded state; None if only weights are taken."""
        manifest = self._manifest
        if self._model_only or manifest is None:
            return None
        return self._folder.path, replace(manifest, state=self.state)

    def load(
        self,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        handlers: Sequence[ChangesWeights] = (),
        elsewhere: Collection[str] = (),
    ) -> None:
        """Fill the tensors in place, apart from those whose values are `elsewhere`.

        If only weights are taken, they may have another floating point type, and `handlers` that
        their run did not have may change them, in order; tensors that these handlers have added
        keep their values if the weights lack them. Raises `CheckpointError`, before any tensor was
        written, if the tensors differ from the checkpoint's.
        """
        folder = self._folder
        if self._base is not None:
            self._base.load(model, {}, handlers, elsewhere=[*elsewhere, *folder.tensors])
            # All that handlers add has to be here: the base has none of it.
            of_base = model.keys() - folder.tensors.keys() - added_to_base(model, handlers)
            elsewhere = [*elsewhere, *of_base]
        skipped = set(elsewhere)
        wanted = {name: tensor for name, tensor in model.items() if name not in skipped}
        stored = {name: entry for name, entry in folder.tensors.items() if name not in skipped}
        if not self._model_only:
            assert self._manifest is not None
            if "optimizer" not in self._excluded:
                wanted = wanted | dict(optimizer)
                stored = dict(select_tensors(self._manifest, of_handlers=False).tensors)
        new_handlers = [handler for handler in handlers if handler.name not in self._handlers]
        made: dict[str, MadeTensors] = {}
        if self._model_only:
            made = _made(wanted, stored, handlers)
            for name in {name for each in made.values() for name in each.names}:
                del wanted[name]
        matrices = {n: torch.empty(each.shape, device="meta") for n, each in made.items()}
        ranks = describe_on_all_ranks(self._world, wanted | matrices)
        if self._model_only:
            # What is there in part is another set of adapters, of which nothing gets a start.
            without = [each for each in new_handlers if not self.holds_any(each.added)]
            added = {name for handler in without for name in handler.added} - stored.keys()
            kept = added & {name for tensors in ranks for name in tensors}
            if kept:
                text = "Initialised %s that handlers add and %s lacks."
                logger.info(text, plural(len(kept), "tensor"), folder.path)
            wanted = {name: tensor for name, tensor in wanted.items() if name not in kept}
            ranks = [{n: entry for n, entry in of.items() if n not in kept} for of in ranks]
            self._log_conversions(stored, ranks)
        # A run that goes on keeps its types, but float64 holds every value of the other types.
        stored = _converted(stored, ranks, _FLOATS if self._model_only else ("float64",))
        differences = tensor_differences(stored, ranks)
        if differences:
            raise CheckpointError(f"{folder.path} does not fit the model: {differences}")
        run_on_all_ranks(self._world, self._what, lambda: self._fill(wanted))
        if self._model_only:
            for handler in new_handlers:
                _change(wanted, handler)
        self._load_made(made, stored, new_handlers)
        what = "weights" if self._model_only else "the run"
        logger.info("Loaded %s from %s.", what, folder.path)

    def _fill(self, wanted: Mapping[str, torch.Tensor]) -> None:
        if isinstance(self._folder, ModelFolder):
            self._folder.load(wanted, self._world.control_group)
        else:
            self._folder.load(wanted)

    def _load_made(
        self,
        made: Mapping[str, MadeTensors],
        stored: Mapping[str, dict[str, Any]],
        handlers: Sequence[ChangesWeights],
    ) -> None:
        """Make tensors of stored matrices, of which only some are in memory at a time."""
        here = self._world.gather_distinct_json(sorted(made))
        names = sorted({name for names in here for name in names})
        for group in _groups({name: math.prod(stored[name]["shape"]) for name in names}):
            matrices = {name: made[name].allocate() for name in group if name in made}
            run_on_all_ranks(self._world, self._what, partial(self._fill, matrices))
            for handler in handlers:
                _change(matrices, handler)
            for name, matrix in matrices.items():
                made[name].store(matrix)

    @property
    def _handlers(self) -> Sequence[str]:
        """The handlers of the run that saved it; none for another program's weights."""
        manifest = self._manifest
        config = None if manifest is None else manifest.info.get("config")
        return stored_value(config or {}, "model.handlers") or ()

    @property
    def _manifest(self) -> Manifest | None:
        return self._folder.manifest if isinstance(self._folder, ModelFolder) else None

    def _open(self, path: Path) -> ModelFolder:
        """Return the folder as rank 0 sees it."""

        def read() -> dict[str, Any]:
            folder = read_model_folder(path)
            manifest = None if folder.manifest is None else manifest_to_json(folder.manifest)
            return {
                "manifest": manifest,
                "tensors": dict(folder.tensors),
                "prefix": folder.prefix,
            }

        found = run_on_rank0(self._world, self._what, read)
        manifest = found["manifest"] and manifest_from_json(found["manifest"])
        return ModelFolder(path, manifest, found["tensors"], found["prefix"])

    def _log_conversions(self, stored: Mapping[str, Any], ranks: list[dict[str, Any]]) -> None:
        changed = {
            (stored[name]["dtype"], entry["dtype"])
            for tensors in ranks
            for name, entry in tensors.items()
            if name in stored and stored[name]["dtype"] != entry["dtype"]
        }
        for before, after in sorted(changed):
            logger.info("Weights are converted from %s to %s.", before, after)


def _commit(path: Path) -> str | None:
    """Return the commit of a repository in the hub's cache; None elsewhere."""
    return path.name if path.parent.name == "snapshots" else None


def _require_commit(path: Path, commit: str | None) -> Path:
    """Return `path` if it is rank 0's `commit`: a branch may have moved between two downloads."""
    if _commit(path) != commit:
        raise InvalidWeights(
            f"{path} is not the commit that rank 0 has, {commit}: name it, as hf://OWNER/NAME@COMMIT"
        )
    return path


def open_base(
    section: Checkpoint,
    manifest: Manifest,
    world: DistributedContext,
    open_foreign: Callable[[Path], WeightSource] | None,
    moved: MovedBase,
) -> InitialLoad | None:
    """Open the base that a checkpoint refers to, downloaded again if it is the hub's and gone.

    None for a whole checkpoint. Raises `CheckpointError` for a base that is missing or changed.
    """
    recorded = base_of(manifest)
    if recorded is None:
        return None
    what = "the base model cannot be looked for"
    place = run_on_rank0(world, what, lambda: place_of_base(recorded, moved))
    if place is None:
        raise missing_base(recorded, moved)
    if is_remote(place):
        what = f"the base model {place} cannot be downloaded"
        place = str(run_on_all_ranks(world, what, partial(download_once, place)))
    update = {"initial_load_path": place, "initial_load_model_only": True}
    base = InitialLoad(section.model_copy(update=update), world, open_foreign)
    found = base.base_record()
    require_same_base(recorded, Path(found["path"]), found["digest"], moved)
    return base


def added_to_base(
    model: Mapping[str, torch.Tensor], handlers: Sequence[ChangesWeights]
) -> frozenset[str]:
    """Return the tensors that handlers add, without those that are made of a base's."""
    made = (each for handler in handlers for each in handler.made_of(model).values())
    of_base = {name for each in made for name in each.names}
    return frozenset[str]().union(*(handler.added for handler in handlers)) - of_base


def _made(
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, dict[str, Any]],
    handlers: Sequence[ChangesWeights],
) -> dict[str, MadeTensors]:
    """Return what is made of stored matrices, by their names, and not stored itself."""
    return {
        name: made
        for handler in handlers
        for name, made in handler.made_of(wanted).items()
        if name in stored and not any(own in stored for own in made.names)
    }


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return the names in groups of at most `_LOADED_AT_ONCE` elements, or of one matrix."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = _LOADED_AT_ONCE
        groups[-1].append(name)
        room -= size
    return groups


def _change(model: Mapping[str, torch.Tensor], handler: ChangesWeights) -> None:
    """Let a handler change this rank's parts; nothing is exchanged."""
    for name, tensor in model.items():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        changed = handler.transform_loaded(name, part)
        if changed is not part:
            part.copy_(changed)


def _converted(
    stored: Mapping[str, dict[str, Any]],
    ranks: list[dict[str, dict[str, Any]]],
    types: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return `stored` with the floating point types of the ranks, where these are in `types`."""
    wanted = {name: entry["dtype"] for tensors in ranks for name, entry in tensors.items()}
    return {
        name: entry | {"dtype": wanted[name]}
        if entry["dtype"] in _FLOATS and wanted.get(name) in types
        else entry
        for name, entry in stored.items()
    }
