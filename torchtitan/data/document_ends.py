"""The tokens that begin and end a document: the tokenizer's own rule, unless the config has one.

The files of a tokenizer say how a text begins: `add_bos_token`, a `bos_token` that is null, or the
post-processor of tokenizer.json. A text ends in the end token unless `add_eos_token` is false; a
post-processor without one says nothing, as it is made for prompts. Something always separates two
documents, and never the same token twice. `data.add_bos` and `data.add_eos` decide otherwise.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Data

if TYPE_CHECKING:
    from torchtitan.data.tokenizers import Tokenizer

CONFIG_NAME = "tokenizer_config.json"
MAP_NAME = "special_tokens_map.json"


class Ends(NamedTuple):
    """The tokens that a tokenizer puts around a document."""

    bos: bool = True
    eos: bool = True
    why: str = ""
    """Reason that a token is left out, for messages."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that the files next to a tokenizer name, and when they are added."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    null_bos: bool = False
    """`bos_token` is null: texts begin without one."""
    add_bos: bool | None = None
    add_eos: bool | None = None
    conflicts: tuple[str, ...] = ()
    """Tokens about which the two files disagree, for a warning."""

    def ends(self, bos_id: int | None, template: Sequence[int] | None = None) -> Ends:
        """Return the rule of these files.

        `template` holds the ids that a post-processor puts around an empty text; None if
        there is none.
        """
        bos, eos, why = True, True, []
        if self.null_bos or self.add_bos is False:
            bos = False
            said = "bos_token is null" if self.null_bos else "add_bos_token is false"
            why.append(f"{said} in {CONFIG_NAME}")
        elif self.add_bos is None and template is not None and list(template[:1]) != [bos_id]:
            bos = False
            why.append("the post-processor of tokenizer.json adds no start token")
        if bos and bos_id is not None and self.add_eos is False:
            eos = False
            why.append(f"add_eos_token is false in {CONFIG_NAME}")
        return Ends(bos and bos_id is not None, eos, "; ".join(why))

    def find(self, bos: int | None, eos: int, id_of: "IdOf") -> tuple[int | None, int]:
        """Return the ids of the start and end token; `bos` and `eos` are the vocabulary's own.

        Raises NoToken for a name that is not in the vocabulary.
        """
        start = bos if self.bos is None else id_of(self.bos)
        if start is None and self.bos is not None and self.add_bos is not False:
            raise NoToken("start", self.bos)
        end = eos if self.eos is None else id_of(self.eos)
        if end is None:
            raise NoToken("end", self.eos)
        return bos if start is None else start, end


IdOf = Callable[[str], int | None]
"""The id of a token; None for one that is not in the vocabulary."""


class NoToken(ValueError):
    """The start or end token is not in the vocabulary."""

    def __init__(self, which: str, name: str | None):
        super().__init__(f"`{name}` is not in its vocabulary" if name else "tried the usual names")
        self.which = which
        self.key = {"start": "bos_token", "end": "eos_token"}[which]


UNNAMED = SpecialTokens()
"""The special tokens of a tokenizer without files next to it."""


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Read tokenizer_config.json and special_tokens_map.json, if they are in `folder`.

    The first is followed where both name a token. Raises ValueError for a damaged file.
    """
    config, names = _read(folder / CONFIG_NAME), _read(folder / MAP_NAME)
    found: dict[str, str | None] = {}
    conflicts = []
    for kind in ("bos", "eos", "pad"):
        key = f"{kind}_token"
        stated, mapped = _text(config.get(key)), _text(names.get(key))
        null = key in config and config[key] is None and kind == "bos"
        found[kind] = stated if stated is not None or null else mapped
        if mapped is not None and (null or stated not in (None, mapped)) and kind != "pad":
            conflicts.append(
                f"{key} is {'null' if null else repr(stated)} in {CONFIG_NAME}"
                f" and {mapped!r} in {MAP_NAME}"
            )
    return SpecialTokens(
        **found,
        null_bos="bos_token" in config and config["bos_token"] is None,
        add_bos=_flag(config.get("add_bos_token")),
        add_eos=_flag(config.get("add_eos_token")),
        conflicts=tuple(conflicts),
    )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not readable: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not readable: it holds no JSON object")
    return content


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


class DocumentTokenizer:
    """A tokenizer with the start and end token of a run's documents. Picklable."""

    def __init__(self, tokenizer: "Tokenizer", bos: bool, eos: bool, why: str = ""):
        self.tokenizer = tokenizer
        self.bos = bos
        self.eos = eos
        self.why = why

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return self.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        """The token that fills up sequences; never a target."""
        pad_id = self.tokenizer.pad_id
        return self.tokenizer.eos_id if pad_id is None else pad_id

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same document could give other ids."""
        # What had both ends before there was a choice keeps the name that checkpoints have stored.
        if self.eos and self.bos == (self.tokenizer.bos_id is not None):
            return self.tokenizer.fingerprint
        return f"{self.tokenizer.fingerprint}+{'bos' * self.bos}{'eos' * self.eos}"

    def encode_document(self, text: str, begins: bool = True, ends: bool = True) -> np.ndarray:
        """Return the ids of a document with the tokens around it: int32 `[num_tokens]`.

        A part of a document gets a start token only if it `begins` it, an end token only if
        it `ends` it.
        """
        return self.tokenizer.encode_array(text, bos=self.bos and begins, eos=self.eos and ends)

    def describe(self) -> str:
        """Describe in one line the tokens around each document."""
        parts = ["TEXT"]
        if self.bos and self.tokenizer.bos_id is not None:
            parts.insert(0, self._name(self.tokenizer.bos_id))
        if self.eos:
            parts.append(self._name(self.tokenizer.eos_id))
        return f"each document is {' '.join(parts)}{f' ({self.why})' if self.why else ''}"

    def _name(self, token: int) -> str:
        name_of = getattr(self.tokenizer, "token_name", None)
        return f"[token {token}]" if name_of is None else str(name_of(token))


def document_tokenizer(tokenizer: "Tokenizer", data: Data) -> DocumentTokenizer:
    """Return the tokenizer of a run's documents.

    Raises ConfigError for `data.add_bos` without a start token.
    """
    own: Ends = getattr(tokenizer, "ends", Ends(bos=tokenizer.bos_id is not None))
    if data.add_bos and tokenizer.bos_id is None:
        problem = "the tokenizer has no start token"
        fix = f'name it in {CONFIG_NAME} as "bos_token", or remove this setting'
        raise ConfigError(ConfigIssue("data.add_bos", problem, fix, True))
    bos = own.bos if data.add_bos is None else data.add_bos
    # Without a start token something else must stand between two documents.
    eos = own.eos or not bos if data.add_eos is None else data.add_eos
    why = [own.why] if own.why else []
    if bos and eos and data.add_bos is None and tokenizer.bos_id == tokenizer.eos_id:
        bos = False
        why.append("one token is both start and end")
    settings = [key for key in ("add_bos", "add_eos") if getattr(data, key) is not None]
    if settings:
        why = [f"set by {' and '.join(f'data.{key}' for key in settings)}"]
    return DocumentTokenizer(tokenizer, bos, eos, "; ".join(why))


def check_ends(tokenizer: "Tokenizer", data: Data) -> list[ConfigIssue]:
    """Return what a user should know about the ends of documents before a run starts."""
    special: SpecialTokens = getattr(tokenizer, "special", UNNAMED)
    problems = [
        ConfigIssue(
            "model.tokenizer_path",
            f"{conflict}; the first is followed",
            "make the files agree",
            severity="warning",
        )
        for conflict in special.conflicts
    ]
    try:
        documents = document_tokenizer(tokenizer, data)
    except ConfigError as error:
        return [*problems, *error.problems]
    if documents.eos or data.add_eos is not None:
        return problems
    problem = (
        f"documents end without an end token, as {documents.why}: a model that is trained on them"
        " does not learn where a text ends"
    )
    fix = "set it to true to end each document in one, or to false to leave it so"
    return [*problems, ConfigIssue("data.add_eos", problem, fix, None, severity="warning")]
