"""What tokenizers share whose library gives the ids of a text as a list."""

import numpy as np

from torchtitan.data.surrogates import without_surrogates


class ListTokenizer:
    """Adds the start and the end token to what `_ids` gives."""

    bos_id: int | None
    eos_id: int

    def _ids(self, text: str) -> list[int]:
        """A new list with the ids of `text`, which UTF-8 can express."""
        raise NotImplementedError

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        ids = self._ids(without_surrogates(text))
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_array(self, text: str, bos: bool, eos: bool) -> np.ndarray:
        return np.array(self.encode(text, bos, eos), dtype=np.int32)
