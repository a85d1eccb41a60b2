"""Halves of characters, which JSON's escapes can leave in a text and UTF-8 has no bytes for."""


def without_surrogates(text: str) -> str:
    """`text` with each lone surrogate as `?`; libraries refuse text that UTF-8 cannot express."""
    if text.isascii():
        return text
    return text.encode("utf-8", errors="replace").decode("utf-8")
