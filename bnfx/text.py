"""Names and messages from anywhere, as text that does nothing but be read."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


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


def meant(word: str, words: Iterable[str]) -> str:
    """What was probably meant by a word that is none of `words`, to end a message with; or ""."""
    near = difflib.get_close_matches(word, {*words}, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
