"""Tokenised documents as a source: a position is found at once, nothing is parsed or tokenised.

A shard for a lane is a range of documents. With the number of lanes that the tokens were made for,
those ranges are the pieces into which the text was cut, so a run reads the same samples as from the
text, shuffled or not; with any other number, they are cut differently.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config import ConfigError, ConfigIssue, DataError
from torchtitan.data.document_ends import DocumentTokenizer
from torchtitan.data.pieces import PIECES_PER_LANE, Shard
from torchtitan.data.sources import Row
from torchtitan.data.token_files import (
    Documents,
    TokenFileError,
    check_sizes,
    open_documents,
    read_index,
    token_folder,
)

_LARGEST_PIECE_TOKENS = 2**20


class TokenSource:
    """The documents of a folder that `torchtitan tokenize` has written."""

    def __init__(self, path: str):
        """Raises ConfigError for a folder that is not whole; looks at the sizes of files only."""
        self.folder: Path = token_folder(path)
        try:
            self.index = read_index(self.folder)
            check_sizes(self.folder, self.index)
        except TokenFileError as error:
            raise ConfigError(unusable(error, path)) from None
        self.description: dict[str, Any] = {"kind": "tokens", "digest": self.index.digest}
        self._opened: dict[int, Documents] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # each process maps files for itself

    def shards(self, num_lanes: int) -> list[Shard]:
        """Cut the data into shards for `num_lanes` lanes."""
        shards = self.index.shards
        if num_lanes == self.index.num_lanes:
            borders = [list(shard.pieces) for shard in shards]
        else:
            size = self.index.num_tokens / (PIECES_PER_LANE * num_lanes)
            size = max(1.0, min(size, _LARGEST_PIECE_TOKENS))
            borders = [_even(s.num_documents, s.num_tokens / size) for s in shards]
        # A piece without a row is one of the text, too, and keeps its place in the order.
        return [
            Shard(file, start, end)
            for file, cuts in enumerate(borders)
            for start, end in itertools.pairwise(cuts)
        ]

    def num_documents(self) -> int:
        """Return the number of documents."""
        return self.index.num_documents

    def rows(self, shard: Shard) -> Iterator[Row]:
        """Yield the rows of a shard."""
        documents = self._documents(shard.file)
        sizes = documents.sizes[shard.start : shard.end].tolist()
        borders = [3] * len(sizes)
        if documents.borders is not None:
            borders = documents.borders[shard.start : shard.end].tolist()
        for number, (size, border) in enumerate(zip(sizes, borders), start=shard.start):
            begins, ends = bool(border & 1), bool(border & 2)
            yield Row(number, size, (shard.file, number), begins=begins, ends=ends)

    def text(self, row: Row) -> np.ndarray:
        """Return the text or the tokens of a row. Raises BadRow."""
        file, number = row.content
        documents = self._documents(file)
        start, end = documents.offsets[number : number + 2].tolist()
        tokens = documents.tokens[start:end].astype(np.int32)
        if len(tokens) != end - start or tokens.max(initial=0) >= self.index.vocab_size:
            name = self.folder / f"{self.index.shards[file].name}.bin"
            raise DataError(f"{name} is damaged: document {number} holds an invalid token")
        return tokens

    def locate(self, shard: Shard, row: Row) -> str:
        """Return where a row is, for a message."""
        return f"{self.folder / self.index.shards[shard.file].name}.bin (document {row.place})"

    def _documents(self, file: int) -> Documents:
        if file not in self._opened:
            try:
                opened = open_documents(self.folder, self.index, self.index.shards[file])
            except TokenFileError as error:
                raise DataError(str(error)) from error
            while len(self._opened) >= 64:  # a process may have few files open
                self._opened.pop(next(iter(self._opened)))
            self._opened[file] = opened
        return self._opened[file]


def tokenizer_problem(
    source: Any, tokenizer: DocumentTokenizer, path: str | None
) -> ConfigIssue | None:
    """Return the problem of tokens that another tokenizer than the run's has made."""
    if not isinstance(source, TokenSource) or source.index.tokenizer == tokenizer.fingerprint:
        return None
    if source.index.tokenizer.partition("+")[0] == tokenizer.tokenizer.fingerprint:
        problem = "the documents of the tokens have other start or end tokens than the run's, where"
        problem += f" {tokenizer.describe()}; they are used unchanged"
        fix = "set data.add_bos and data.add_eos as they were, or tokenize the text again"
        return ConfigIssue("training.dataset_path", problem, fix, path, severity="warning")
    return ConfigIssue(
        "training.dataset_path",
        f"the tokens were made by another tokenizer ({_short(source.index.tokenizer)}) than"
        f" model.tokenizer_path ({_short(tokenizer.fingerprint)})",
        "set model.tokenizer_path to the tokenizer that made them, or tokenize the text again",
        path,
    )


def unusable(error: TokenFileError, path: str) -> ConfigIssue:
    """Return the problem of a folder of tokens that cannot be used."""
    key = "training.dataset_path"
    return ConfigIssue(key, str(error), error.fix, path, missing_asset=error.missing)


def _short(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) < 24 else f"{fingerprint[:20]}..."


def _even(num_documents: int, num_pieces: float) -> list[int]:
    """Return borders of about so many equal ranges of documents."""
    count = max(1, min(num_documents, round(num_pieces)))
    return [num_documents * k // count for k in range(count + 1)]
