"""Whether the Hugging Face hub can be reached, so that no library tries in vain for long."""

import contextlib
import threading
import time
from collections.abc import Iterator

_TRIES = 3
_PAUSE_SECONDS = 1.0
_ANSWER_SECONDS = 4.0
_MOST_SECONDS = 8.0
"""For all tries together; looking up a name may take longer, and no library bounds that."""


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """While entered, `datasets` uses what it has on the disk if the hub does not answer."""
    from datasets import config  # type: ignore[import-untyped]

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not _answers(config.HF_ENDPOINT)
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    """Whether anything comes back; if it is an error, the library says what is wrong."""
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask() -> None:
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            with contextlib.suppress(Exception):
                get_session().head(endpoint, timeout=_ANSWER_SECONDS)
                answered.set()
                return

    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(_MOST_SECONDS)
    return answered.is_set()
