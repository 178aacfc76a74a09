"""From a model's output to the stretch of text it gives as its answer. Pure functions, strict rules.

Tried in this order, the first that applies decides:

1. `boxed`: the content of the last `\\boxed{...}`, braces nested. A last box that is not closed, or is empty,
   is *no answer*: nothing else is tried, because what was meant to be the answer is not there.
2. `declared`: what follows the last "final answer is:", "the answer is", "correct answer: ...", to the end of
   the line (or the next line with text, if the line ends there).
3. `bare`: the whole output, or, after latent spans, what follows the last one. The caller must read it as an
   answer from end to end (a letter, a path); prose is never searched.

Every value is a substring of the output. Nothing here knows what kind of answer is expected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """How an answer was found, or why there is none."""

    BOXED = "boxed"
    DECLARED = "declared"
    BARE = "bare"
    BROKEN_BOX = "broken_box"  # the last box is not closed
    EMPTY = "empty"  # an empty box, a declaration with nothing behind it, or an empty output


@dataclass(frozen=True)
class Extraction:
    """`value` is `output[start:end]`; None with start = end = 0 when the output gives no answer."""

    value: str | None
    rule: Rule
    start: int = 0
    end: int = 0


_END_OF_TURN = re.compile(r"<\|im_end\|>|<\|endoftext\|>")
_MARKER = re.compile(r"<\|[a-z_]+\|>|⟦[^⟧\n]*⟧")  # latent and chat tokens, and how a terminal shows a span
_BOX = re.compile(r"\\boxed\s*\{")
_DECLARATION = re.compile(
    r"(?:\bfinal\s+answer\b|\b(?:correct|best|right)\s+(?:answer|choice|option)\b|\b(?:the|my)\s+answer\b"
    r"|^[^\w\n]*answer\b)"
    r"[*_]*[^\S\n]*(?:(?:is|would\s+be|should\s+be)\b[^\S\n]*[*_]*[^\S\n]*[:：]?|[:：])[*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_LEFT_WRAP = re.compile(r"(?:\s|[*_`\"'“”‘’$]|\\[(\[]|\\,)+")
_RIGHT_WRAP = re.compile(r"(?:\s|[*_`\"'“”‘’$.。!！]|\\[)\]]|\\,)")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|texttt)\s*\{")


def extract(output: str) -> Extraction:
    """The answer of an output by the module's three rules.

    >>> extract("first \\\\boxed{3}, finally \\\\boxed{\\\\text{B}}").value
    'B'
    >>> extract("The final answer is: 70°.<|im_end|>").value
    '70°'
    >>> extract("Reasoning: DLLU\\n\\\\boxed{DLLU").rule
    <Rule.BROKEN_BOX: 'broken_box'>
    """
    stop = end_of_turn(output)
    for rule in (last_boxed, declared):
        found = rule(output, stop)
        if found is not None:
            return found
    return bare(output, stop)


def end_of_turn(output: str) -> int:
    """Where the model's turn ends: at the first end token, else at the end of the text."""
    match = _END_OF_TURN.search(output)
    return len(output) if match is None else match.start()


def last_boxed(output: str, stop: int) -> Extraction | None:
    """The content of the last `\\boxed{...}` before `stop`; None if there is no box.

    `\\{` and `\\}` are characters, not nesting.
    """
    opening = None
    for match in _BOX.finditer(output, 0, stop):
        opening = match.end()
    if opening is None:
        return None
    end = _closing_brace(output, opening, stop)
    return Extraction(None, Rule.BROKEN_BOX) if end is None else _found(output, opening, end, Rule.BOXED)


def declared(output: str, stop: int) -> Extraction | None:
    """What follows the last declaration ("final answer is:", "the answer is", "Answer:" at the start of a line).

    The value ends with its line, or at a latent span. None if nothing is declared.
    """
    start = None
    for match in _DECLARATION.finditer(output, 0, stop):
        start = match.end()
    if start is None:
        return None
    while start < stop and output[start].isspace():  # "The correct answer is:\n\nC"
        start += 1
    end = min((i for i in (output.find("\n", start, stop),) if i >= 0), default=stop)
    marker = _MARKER.search(output, start, end)
    return _found(output, start, end if marker is None else marker.start(), Rule.DECLARED)


def bare(output: str, stop: int) -> Extraction:
    """The whole output, or what follows the last latent span."""
    start = 0
    for match in _MARKER.finditer(output, 0, stop):
        start = match.end()
    return _found(output, start, stop, Rule.BARE)


def trim(text: str, start: int, end: int) -> tuple[int, int]:
    """`text[start:end]` without white space, quotes, emphasis, `$` and a closing full stop around it, and without
    a LaTeX text command that holds all of it: `**\\text{(B)}**.` becomes `(B)`."""
    while True:
        before = (start, end)
        if (match := _LEFT_WRAP.match(text, start, end)) is not None:
            start = match.end()
        while start < end:
            width = 2 if end - start >= 2 and text[end - 2] == "\\" else 1
            if _RIGHT_WRAP.fullmatch(text, end - width, end) is None:
                break
            end -= width
        match = _LATEX_TEXT.match(text, start, end)
        if match is not None and _closing_brace(text, match.end(), end) == end - 1:
            start, end = match.end(), end - 1
        if (start, end) == before:
            return start, end


def _found(output: str, start: int, end: int, rule: Rule) -> Extraction:
    start, end = trim(output, start, end)
    return Extraction(None, Rule.EMPTY) if start == end else Extraction(output[start:end], rule, start, end)


def _closing_brace(text: str, start: int, stop: int) -> int | None:
    """Position of the brace that closes the one opened just before `start`; None if it is not before `stop`."""
    depth, position = 1, start
    while position < stop:
        character = text[position]
        if character == "\\":  # an escaped character, or a command
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None
