"""Repositories of the Hugging Face hub as checkpoints: `hf://owner/name[@revision]`. No torch.

Files lie in the cache of `huggingface_hub`, where other programs find them. A download that was
interrupted continues with the files that are not there yet.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.utils.redaction import HIDDEN, redact
from torchtitan.utils.text import plural
from torchtitan.weights.description import KEY
from torchtitan.weights.tokenizer_files import TOKENIZER_FILES

T = TypeVar("T")
_PREFIX = "hf://"
_PATH = re.compile(r"hf://(?P<repo_id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_CONFIGS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_INDEX = "model.safetensors.index.json"
_NETWORKS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors mean that no answer came."""
_LOG_IN = "set HF_TOKEN, or run `hf auth login`"


@dataclass(frozen=True)
class Asked:
    """A question to the hub, and the keys under which its answers are reported."""

    repo_id: str
    revision: str | None
    token: str | None = None
    """None: that of the environment or the login."""
    repo_key: str = KEY
    revision_key: str = KEY
    folder_key: str = "HF_HOME"
    access: Literal["read", "write"] = "read"
    """The direction of a request: `read` files, or `write` some."""

    def ask(self, question: Callable[[dict[str, Any]], T]) -> T:
        """Return the hub's answer; `question` takes arguments for `huggingface_hub`.

        Raises `ConfigError` if the hub refuses or cannot be reached.
        """
        import huggingface_hub

        where = {"repo_id": self.repo_id, "revision": self.revision, "token": self.token}
        try:
            return question(where)
        except ConfigError:
            raise
        except Exception as error:
            token = self.token or huggingface_hub.get_token()
            # Threads that upload wrap what ended them.
            problems = (_hub_problem(cause, self, token) for cause in _causes(error))
            problem = next((found for found in problems if found is not None), None)
            if problem is None:
                raise
        raise ConfigError(problem)


def is_hub_path(path: str) -> bool:
    """Return whether a path names a repository of the hub."""
    return path.startswith(_PREFIX)


def download(path: str, with_weights: bool = True) -> Path:
    """Return the local folder of a repository, after downloading what is missing.

    One process downloads and the others on its machine wait. Without `with_weights` only config
    and tokenizer are there. With `HF_HUB_OFFLINE` the cache must have the files. Raises
    `ConfigError`.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        text, fix = (
            "does not name a repository",
            "write hf://owner/name or hf://owner/name@revision",
        )
        raise ConfigError(ConfigIssue(KEY, text, fix, path))
    asked = Asked(match["repo_id"], match["revision"])
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    name = re.sub(r"[/:@]+", "--", path) + ("" if with_weights else "--config")
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / f"torchtitan--{name}.lock"
    done = lock.with_name(f"{lock.name}.done")
    began = time.time()
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            # A process that had the lock in the meantime has asked the hub, and found it all.
            is_done = done.exists() and done.stat().st_mtime >= began
            local = is_done or constants.HF_HUB_OFFLINE
            folder = _cached(asked, path) if local else _fetch(asked, path, with_weights)
            done.touch()
    except OSError as error:
        text = f"cannot be written: {error.strerror or error}"
        fix = "set HF_HOME to a folder that this user may write to"
        raise ConfigError(ConfigIssue("HF_HOME", text, fix, str(lock.parent.parent))) from error
    _require_complete(folder, path, with_weights)
    return folder


def hub_path_of(folder: Path) -> str | None:
    """Return `hf://owner/name@commit` of a folder in a cache of the hub; None for others."""
    match = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", folder.parent.parent.name, re.ASCII)
    if match is None or folder.parent.name != "snapshots":
        return None
    return f"{_PREFIX}{match[1]}/{match[2]}@{folder.name}"


def download_once(path: str) -> Path:
    """Return the folder of `hf://owner/name@commit`; asks the hub only if the cache lacks a file.

    Raises `ConfigError`.
    """
    match = _PATH.fullmatch(path)
    if match is not None and re.fullmatch("[0-9a-f]{40}", match["revision"] or ""):
        with suppress(ConfigError):
            folder = _cached(Asked(match["repo_id"], match["revision"]), path)
            _require_complete(folder, path, with_weights=True)
            return folder
    return download(path)


def _fetch(asked: Asked, path: str, with_weights: bool) -> Path:
    """Download the files of a model, as the hub names them now."""
    from huggingface_hub import model_info, snapshot_download

    # Unlike a download, this does not retry: without a network it fails at once.
    info = asked.ask(lambda where: model_info(**where, timeout=30, files_metadata=True))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = [name for name in sizes if name in _CONFIGS]
    weights = [n for n in sizes if n.endswith(".safetensors") and "/" not in n]
    # Mistral's repositories hold the same weights again under this name.
    weights = [name for name in weights if not name.startswith("consolidated")]
    if "config.json" not in sizes or not weights:
        raise ConfigError(_unusable(path, list(sizes)))
    if with_weights:
        wanted += [*weights, *(name for name in sizes if name == _INDEX)]
        gigabytes = sum(sizes[name] for name in wanted) / 1e9
        text = (
            f"downloading {path}: {plural(len(wanted), 'file')}, {gigabytes:.2f} GB, to the cache"
        )
        print(text, file=sys.stderr, flush=True)
    return Path(asked.ask(lambda where: snapshot_download(**where, allow_patterns=wanted)))


def _cached(asked: Asked, path: str) -> Path:
    """Return the folder in the cache, without asking the hub."""
    from huggingface_hub import errors, snapshot_download

    # The library counts a folder as incomplete that lacks any file of the pattern.
    pattern = "config.json"
    try:
        return Path(
            snapshot_download(
                asked.repo_id,
                revision=asked.revision,
                allow_patterns=pattern,
                local_files_only=True,
            )
        )
    except errors.LocalEntryNotFoundError:
        fix = "unset it, or fill the cache on a machine that is connected (same HF_HOME)"
        text = f"is set, and the cache has no copy of {path}"
        raise ConfigError(ConfigIssue("HF_HUB_OFFLINE", text, fix)) from None


def _require_complete(folder: Path, path: str, with_weights: bool) -> None:
    """Raise `ConfigError` unless the files are there: a cache may hold a part of them."""
    wanted = ["config.json"]
    if with_weights and (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        wanted += sorted(set(index.get("weight_map", {}).values()))
    missing = [name for name in wanted if not (folder / name).is_file()]
    if with_weights and not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        text = f"the copy in the cache, {folder}, lacks {', '.join(missing)}"
        raise ConfigError(ConfigIssue(KEY, text, "unset HF_HUB_OFFLINE to download the rest", path))


def _unusable(path: str, names: list[str]) -> ConfigIssue:
    suffixes = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
    others = [name for name in names if name.endswith(suffixes)]
    lacks = [name for name in ("config.json",) if name not in names]
    lacks += ["safetensors"] * (not any(name.endswith(".safetensors") for name in names))
    text = f"the repository has no {' and no '.join(lacks)}"
    fix = "use a repository that has them"
    if others:
        text += f", but {', '.join(others[:3])}"
        fix += "; or download these, and name the folder or the GGUF file here"
        if all(name.endswith(".bin") for name in others):
            fix = (
                "load it with transformers and save it with save_pretrained, which writes"
                " safetensors; name that folder here"
            )
    return ConfigIssue(KEY, text, fix, path)


def _hub_problem(error: Exception, asked: Asked, token: str | None) -> ConfigIssue | None:
    """Return the problem behind an error of `huggingface_hub`; None for a bug.

    `token` is what was sent, if anything; it is kept out of the text.
    """
    from huggingface_hub import constants, errors

    key, repo_id = asked.repo_key, asked.repo_id
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, errors.HFValidationError):
        return ConfigIssue(key, "is not a repository name", "write OWNER/NAME", repo_id)
    if isinstance(error, errors.OfflineModeIsEnabled):
        text = "is set, which forbids downloads"
        fix = "unset it, or copy the files from a machine that is connected"
        if asked.access == "write":
            text, fix = "is set, which forbids uploads", "unset it"
        return ConfigIssue("HF_HUB_OFFLINE", text, fix)
    if isinstance(error, errors.GatedRepoError):
        if token is None:
            problem, fix = "is gated, and there is no token", f"ask for access on {page}; {_LOG_IN}"
        else:
            problem = "is gated, and the token's owner has no access to it"
            fix = f"ask for access on {page}, and wait until it is granted"
        return ConfigIssue(key, problem, fix, repo_id)
    if isinstance(error, errors.RevisionNotFoundError):
        problem = f"{repo_id} has no branch, tag or commit of this name"
        fix = "leave it out for `main`"
        return ConfigIssue(asked.revision_key, problem, fix, asked.revision)
    if isinstance(error, errors.RepositoryNotFoundError):
        fix = "check the spelling"
        if token is None:
            fix += f"; if it is private, {_LOG_IN}"
        return ConfigIssue(key, "does not exist, or is private", fix, repo_id)
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, asked, token)
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_of_the_network(error):
        # The message about a token that no header can hold contains the token.
        text = redact(str(error.__cause__ or error)).partition("Bearer")[0]
        text = text.replace(token, HIDDEN) if token else text
        fix = "check the network, its proxy (HTTPS_PROXY), and HF_ENDPOINT if it is set"
        if asked.access == "write":
            fix += "; then the same command continues"
        return ConfigIssue(key, f"{constants.ENDPOINT} cannot be reached: {text}", fix, repo_id)
    if isinstance(error, OSError):
        verb = "written" if asked.access == "read" else "read"
        problem = f"cannot be {verb}: {error.strerror or error}"
        return ConfigIssue(asked.folder_key, problem, "use another folder")
    if isinstance(error, ValueError) and "LFS batch" in str(error):
        text = redact(str(error)).partition("\n")[2]
        return ConfigIssue(key, f"the hub does not take a file: {text}", "see its page", repo_id)
    return None


def _causes(error: BaseException | None) -> Iterator[Exception]:
    while isinstance(error, Exception):
        yield error
        error = error.__cause__


def _answered(error: Exception, asked: Asked, token: str | None) -> ConfigIssue:
    """Return the problem behind an HTTP status."""
    key, repo_id = asked.repo_key, asked.repo_id
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = redact(getattr(error, "server_message", None) or "")
    reason = f" ({said})" if said else ""
    if status == 401 and token is None:
        return ConfigIssue(key, f"needs a token that may {asked.access} it", _LOG_IN, repo_id)
    if status == 401:
        fix = f"{_LOG_IN} with a token that is valid"
        return ConfigIssue(key, "the hub does not accept the token", fix, repo_id)
    if status == 403:
        fix = "give it the right to read this repository (or gated ones), on the hub's page"
        if asked.access == "write":
            fix = f"give it the right to write to {repo_id}, on the hub's page, or use another name"
        return ConfigIssue(key, f"the token does not grant access{reason}", fix, repo_id)
    if status in (409, 412):
        text = f"somebody else has changed the repository meanwhile{reason}"
        return ConfigIssue(key, text, "look at it, then run the command again", repo_id)
    return ConfigIssue(key, f"the hub answered with status {status}{reason}", "try later", repo_id)


def _is_of_the_network(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.partition(".")[0] in _NETWORKS
