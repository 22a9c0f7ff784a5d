"""Names and messages from anywhere, as text that does nothing but be read."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    r"""`text` with characters that would act where they are shown written out, such as `\x1b`.

    These are control characters, which a terminal obeys, and those that change the direction of
    writing or are no characters at all.
    """
    if text.isprintable():
        return text
    return "".join(c if harmless(c) else c.encode("unicode_escape").decode() for c in text)


def harmless(character: str) -> bool:
    """Whether a character is one to read."""
    if character.isprintable() or character in "\n\t":
        return True
    return unicodedata.category(character) == "Zs"  # spaces of other widths
