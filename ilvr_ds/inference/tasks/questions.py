"""Judging questions: multiple choice where options are known, a short answer otherwise."""

from __future__ import annotations

from ilvr_ds.inference.scoring.choices import choose, reference_letter
from ilvr_ds.inference.scoring.matching import same_answer, short_answer
from ilvr_ds.inference.scoring.published import published_extract, published_same
from ilvr_ds.inference.tasks.task import Example, Rules, Verdict


def judge_question(example: Example, output: str, rules: Rules) -> Verdict:
    """Outcomes: correct, wrong, no_answer.

    With options, and a reference that is a letter or the text of one of them: the option chosen must be that one;
    a letter and its text are the same answer. Otherwise the short answer must equal the reference.
    """
    assert example.answer is not None  # set by the readers of question files
    if rules.published:
        found = published_extract(output)
        correct = found.value is not None and published_same(found.value, example.answer)
        return _verdict(correct, found.value, found.rule.value)
    wanted = reference_letter(example.answer, example.options) if example.options else None
    if wanted is not None:
        choice = choose(output, example.options)
        return _verdict(
            choice.letter == wanted, None if choice.letter is None else choice.found.value, choice.found.rule.value
        )
    found = short_answer(output)
    correct = found.value is not None and same_answer(found.value, example.answer)
    return _verdict(correct, found.value, found.rule.value)


def _verdict(correct: bool, extraction: str | None, rule: str) -> Verdict:
    outcome = "correct" if correct else "no_answer" if extraction is None else "wrong"
    return Verdict(correct, outcome, extraction, rule)
