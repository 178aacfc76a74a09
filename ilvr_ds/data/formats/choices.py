"""Multiple-choice questions: how options are listed and how the answer is said, the same in every data set."""

from __future__ import annotations

from ilvr_ds.data.formats.jsonl import Fields


def listed(options: dict[str, str]) -> str:
    """One option a line: `(A) text`."""
    return "\n".join(f"({letter}) {text}" for letter, text in options.items())


def letter_answer(fields: Fields, field: str, options: dict[str, str]) -> str:
    """The text of the option whose letter `field` holds. Raises RecordError bad_answer."""
    letter = fields.take_text(field).strip()
    if letter not in options:
        raise fields.error("bad_answer", field, f"{letter!r:.40} is no option; the options are {', '.join(options)}")
    return options[letter]


def final_answer(text: str) -> str:
    """The last step of an assistant turn, in the words of ILVR's own records."""
    return f"The final answer is: {text}"


def sentence_break(text: str) -> str:
    """`text` ready to be followed by the final answer: ends in a line break unless it is empty."""
    return f"{text.rstrip()}\n" if text.strip() else ""
