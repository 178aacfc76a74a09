"""Multiple choice: the options in a question, and the option an output chooses.

`options` maps letters to texts, {"A": "20°", "B": "30°"}; empty when the texts are not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ilvr_ds.inference.scoring.extract import Extraction, Rule, end_of_turn, extract, trim
from ilvr_ds.inference.scoring.matching import normalise, same_answer

_LETTER_ALONE = re.compile(r"\(?\s*(?:option|choice|answer)?\s*\(?\s*([A-Za-z])\s*\)?\s*[.:)]?", re.IGNORECASE)
_LETTER_FIRST = re.compile(
    r"(?:\(([A-Z])\)|([A-Z])[.:)](?=\s|$)|(?:option|choice)\s+\(?([A-Z])\)?(?=[\s,:.;)]))\W{0,4}", re.IGNORECASE
)
_LETTER_IN_PARENTHESES = re.compile(r"\((?:choice\s+|option\s+)?([A-Z])\)", re.IGNORECASE)
_OPTION_LINE = re.compile(r"^[^\S\n]*(?:\(([A-Z])\)|([A-Z])[.):])[^\S\n]+(\S[^\n]*?)[^\S\n]*$", re.MULTILINE)


@dataclass(frozen=True)
class Choice:
    """`letter`: the option chosen, None if none is. `found`: where in the output, and by which rule."""

    letter: str | None
    found: Extraction


def parse_options(question: str) -> dict[str, str]:
    """The options listed in a question, one a line, `A. text`, `A) text`, `A: text` or `(A) text`, in order from A.

    The last such list counts; {} when there is none with two options or more.

    >>> parse_options("Where is it?\\nA. Left.\\n(B) Right.")
    {'A': 'Left.', 'B': 'Right.'}
    """
    best: dict[str, str] = {}
    options: dict[str, str] = {}
    for match in _OPTION_LINE.finditer(question):
        letter = match[1] or match[2]
        if letter == "A":
            options = {}
        elif letter != chr(ord("A") + len(options)):
            continue
        options[letter] = match[3]
        if len(options) >= 2:
            best = options
    return dict(best)


def choose(output: str, options: Mapping[str, str]) -> Choice:
    """The option an output chooses; strict.

    In the answer that `extract` finds, if it is boxed or declared: a letter alone, the text of exactly one
    option, or a letter with its text ("(B) the third image"); see `read_choice`. Otherwise (`bare`), in this
    order: the whole output is one line and such an answer; its first line begins with a letter and no later line
    begins with another; its last line ends with a letter in parentheses and its text; the whole output names the
    text (two words or more) of exactly one option.
    """
    found = extract(output)
    if found.value is None:
        return Choice(None, found)
    one_line = "\n" not in found.value  # a text of several lines that begins with "A:" may go through the options
    letter = read_choice(found.value, options) if one_line or found.rule is not Rule.BARE else None
    if letter is not None or found.rule is not Rule.BARE:
        return Choice(letter, found)
    for rule in (_leading, _concluding, _only_option_named):
        span = rule(output, found, options)
        if span is not None:
            letter, start, end = span
            return Choice(letter, Extraction(output[start:end], Rule.BARE, start, end))
    return Choice(None, found)


def read_choice(value: str, options: Mapping[str, str]) -> str | None:
    """The option that a short text names.

    A letter alone (in any case), the text of exactly one option, or a letter followed by text. None for a letter
    that is no option, for a letter with another option's text, and for several letters in parentheses.

    >>> read_choice("(b)", {}), read_choice("30°", {"A": "20°", "B": "30°"}), read_choice("(A) or (B)", {})
    ('B', 'B', None)
    """
    start, end = trim(value, 0, len(value))
    value = value[start:end]
    match = _LETTER_ALONE.fullmatch(value)
    if match is not None and (not options or match[1].upper() in options):
        return match[1].upper()
    by_text = [letter for letter, text in options.items() if same_answer(text, value)]
    if len(by_text) == 1:
        return by_text[0]
    match = _LETTER_FIRST.match(value)
    if match is None:
        return None
    letter = (match[1] or match[2] or match[3]).upper()
    rest = value[match.end() :]
    others = {other for other in _marked(rest) if not options or other in options} - {letter}
    if others or (options and letter not in options):
        return None
    contradicted = any(same_answer(text, rest) for other, text in options.items() if other != letter)
    return None if contradicted and not same_answer(options[letter], rest) else letter


def reference_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option a reference answer means: the one with exactly this text, else as `read_choice` reads it.

    The text comes first here because data sets publish the text (CoMT for ILVR), and a text can be a letter.
    """
    exact = [letter for letter, text in options.items() if text == answer]
    return exact[0] if len(exact) == 1 else read_choice(answer, options)


Span = tuple[str, int, int]


def _leading(output: str, found: Extraction, options: Mapping[str, str]) -> Span | None:
    """A first line that begins with "(B)", "B.", "B:" or is a letter, when no later line begins so."""
    lines = _lines(output, found.start, end_of_turn(output))
    heads = [
        read_choice(output[start:end], options) if _begins_with_letter(output, start) else None for start, end in lines
    ]
    if heads[0] is None or any(head not in (None, heads[0]) for head in heads[1:]):
        return None
    return heads[0], *lines[0]


def _concluding(output: str, found: Extraction, options: Mapping[str, str]) -> Span | None:
    """A last line that is "(B) the third image", or ends so after a colon."""
    start, end = _lines(output, found.start, end_of_turn(output))[-1]
    colon = output.rfind(": ", start, end)
    start, end = trim(output, start if colon < 0 else colon + 1, end)
    match = _LETTER_IN_PARENTHESES.match(output, start, end)
    if match is None:
        return None
    letter = read_choice(output[start:end], options)
    known = letter is not None and letter in options
    rest = output[match.end() : end]
    if letter is None or (rest.strip() and known and not same_answer(options[letter], rest)):
        return None
    return letter, start, end


def _only_option_named(output: str, found: Extraction, options: Mapping[str, str]) -> Span | None:
    """The one option whose text, of two words or more, occurs in the output."""
    named: list[Span] = []
    for letter, text in options.items():
        words = normalise(text).split()
        if len(words) < 2:
            return None
        pattern = r"(?<!\w)" + r"\s+".join(re.escape(word) for word in words) + r"(?!\w)"
        match = re.search(pattern, output[: end_of_turn(output)], re.IGNORECASE)
        if match is not None:
            named.append((letter, match.start(), match.end()))
    marked = _marked(output) & options.keys()
    return named[0] if len(named) == 1 and marked <= {named[0][0]} else None


def _marked(text: str) -> set[str]:
    """Letters in parentheses, "(B)" or "(choice B)", in capitals."""
    return {letter.upper() for letter in _LETTER_IN_PARENTHESES.findall(text)}


def _begins_with_letter(text: str, start: int) -> bool:
    return re.compile(r"\W*(?:\([A-Z]\)|[A-Z](?:[.:)](?=\s|$)|\s*$))", re.MULTILINE).match(text, start) is not None


def _lines(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Spans of the lines with text in `text[start:end]`; at least one."""
    lines = [m.span() for m in re.compile(r"[^\n]*\S[^\n]*").finditer(text, start, end)]
    return lines or [(start, end)]
