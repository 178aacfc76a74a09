"""The laxer rules of the published ILVR scripts, for comparison with published numbers only (`--published-rules`).

What they let through that our own rules do not: letters of a plan picked out of any text in the box or after
"final answer" ("up and down" becomes U, D, D), "a", "true" and "yes" taken for the same answer (and "b", "false",
"no"), a single such word anywhere in the output taken for the answer, and otherwise the whole first line.
"""

from __future__ import annotations

import re

from ilvr_ds.inference.scoring.extract import Extraction, Rule, end_of_turn, last_boxed

_FLAT_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_DECLARATIONS = (
    re.compile(r"final\s*answer\s*(?:is)?\s*[:：]?\s*([^\n\r]+)", re.IGNORECASE),
    re.compile(r"answer\s*(?:is)?\s*[:：]\s*([^\n\r]+)", re.IGNORECASE),
)
_PATH_DECLARATION = re.compile(r"final\s*answer\s*(?:is)?\s*[:：]\s*([UDLR]+)", re.IGNORECASE)
_MARKER = re.compile(r"<\|[a-z_]+\|>")
_YES, _NO = frozenset({"yes", "true", "a"}), frozenset({"no", "false", "b"})
_LEFT, _RIGHT = " \t*_`'\"“‘([{【", " \t*_`'\"”’)]}】.。,，!！?？;；:："


def published_path(output: str) -> str:
    """Every letter U, D, L, R, in any case, in the last box; else those right after "final answer is:".

    >>> published_path("\\\\boxed{go up}")
    'U'
    """
    stop = end_of_turn(output)
    box = last_boxed(output, stop)
    if box is not None and box.value is not None:
        source = box.value
    else:
        match = _PATH_DECLARATION.search(output, 0, stop)
        source = "" if match is None else match[1]
    return "".join(letter for letter in source.upper() if letter in "UDLR")


def published_extract(output: str) -> Extraction:
    """The last box without inner braces; else the last "final answer" or "answer:"; else a lone yes/no word; else
    the first line. Brackets, quotes and punctuation around it cut off."""
    stop = end_of_turn(output)
    boxes = list(_FLAT_BOX.finditer(output, 0, stop))
    if boxes:
        return _clean(output, *boxes[-1].span(1), Rule.BOXED)
    for pattern in _DECLARATIONS:
        for match in reversed(list(pattern.finditer(output, 0, stop))):
            found = _clean(output, *match.span(1), Rule.DECLARED)
            if found.value is not None:
                return found
            break
    words = [m for m in re.finditer(r"[A-Za-z]+", output[:stop]) if m[0].lower() in _YES | _NO]
    if len(words) == 1:
        return _clean(output, *words[0].span(), Rule.BARE)
    start = len(output[:stop]) - len(output[:stop].lstrip())
    line_end = min((i for i in (output.find("\n", start, stop),) if i >= 0), default=stop)
    return _clean(output, start, line_end, Rule.BARE)


def published_same(first: str, second: str) -> bool:
    """Equal after their normalisation: case, numbers as floats, yes = true = a, no = false = b.

    >>> published_same("true", "A"), published_same("2", "2.0")
    (True, True)
    """
    return _normalise(first) == _normalise(second)


def _normalise(text: str) -> str:
    text = text.strip(_LEFT + _RIGHT + "\n\r").lower()
    if text in _YES:
        return "yes"
    if text in _NO:
        return "no"
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else str(number)


def _clean(output: str, start: int, end: int, rule: Rule) -> Extraction:
    marker = _MARKER.search(output, start, end)
    end = end if marker is None else marker.start()
    while start < end and output[start] in _LEFT:
        start += 1
    while start < end and output[end - 1] in _RIGHT:
        end -= 1
    return Extraction(None, Rule.EMPTY) if start == end else Extraction(output[start:end], rule, start, end)
