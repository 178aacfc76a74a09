"""Are two short answers the same? Equal texts after small changes of writing, or equal numbers."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from ilvr_ds.inference.scoring.extract import Extraction, Rule, extract, trim

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[+-]?\.\d+")
_SPACE = re.compile(r"\s+")


def normalise(text: str) -> str:
    """One form for ways of writing the same: NFC (NFKC would make x2 of x²), case folded, single spaces, trimmed.

    >>> normalise(" **A  Knife.** ")
    'a knife'
    """
    text = unicodedata.normalize("NFC", text)
    start, end = trim(text, 0, len(text))
    return _SPACE.sub(" ", text[start:end]).casefold().strip()


def parse_number(text: str) -> Decimal | None:
    """A text that is a plain decimal number and nothing else ("2", "2.0", "1,200", "-.5"); None otherwise.

    No fractions, units, percent signs or words: 12/02 may be a date.
    """
    text = normalise(text).replace("−", "-")
    if not text.isascii() or _NUMBER.fullmatch(text) is None:
        return None
    return Decimal(text.replace(",", ""))


def same_answer(first: str, second: str) -> bool:
    """Whether two short answers are equal as numbers or as normalised texts.

    >>> same_answer("2", "2.0"), same_answer("12/02", "02/12"), same_answer("A knife.", "a knife")
    (True, False, True)
    """
    numbers = parse_number(first), parse_number(second)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return normalise(first) == normalise(second) != ""


def short_answer(output: str) -> Extraction:
    """The short answer of an output: what `extract` finds, a bare output only if it is one word ("C", "12", "yes").

    >>> short_answer("A knife.").value is None, short_answer("The final answer is: A knife.").value
    (True, 'A knife')
    """
    found = extract(output)
    if found.value is not None and found.rule is Rule.BARE and len(found.value.split()) > 1:
        return Extraction(None, Rule.BARE)
    return found
