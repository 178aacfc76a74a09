"""Answer extraction: the three rules, their order, and what no text may do."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.inference.scoring import choices, extract, intervals, matching, paths, published
from ilvr_ds.inference.scoring.extract import Rule

PIECES = st.sampled_from(
    ["\\boxed{", "\\boxed {", "{", "}", "\\text{", "\\", "final answer is:", "The answer is", "Answer:", "**", "$",
     "\\(", "\\)", "(A)", "B.", "D", "L, U", "down", "\n", " ", ".", "<|im_end|>", "<|latent_start|>", "<|latent_end|>",
     "⟦8 latents⟧", "12/02", "2.0", "option C", "é", "\u0130", "ß", "\x00"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))


@pytest.mark.parametrize("module", [choices, extract, intervals, matching, paths, published])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert (result.attempted > 0, result.failed) == (True, 0)


@pytest.mark.parametrize(
    ("output", "value", "rule"),
    [
        ("\\boxed{B}", "B", Rule.BOXED),
        ("\\boxed{A} no, \\boxed{B}", "B", Rule.BOXED),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", Rule.BOXED),
        ("\\[ \\boxed{\\text{(C)}} \\]", "(C)", Rule.BOXED),
        ("$\\boxed{\\{1, 2\\}}$", "\\{1, 2\\}", Rule.BOXED),
        ("\\boxed{\\boxed{7}}", "7", Rule.BOXED),
        ("\\boxed{A} The final answer is: B", "A", Rule.BOXED),  # the box comes first
        ("\\boxed{A}<|im_end|>\\boxed{B}", "A", Rule.BOXED),  # after the turn's end nothing counts
        ("\\boxed{A", None, Rule.BROKEN_BOX),
        ("\\boxed{A} then \\boxed{B", None, Rule.BROKEN_BOX),  # never back to an earlier box
        ("The final answer is: B \\boxed{", None, Rule.BROKEN_BOX),
        ("\\boxed{}", None, Rule.EMPTY),
        ("\\boxed{ $ }", None, Rule.EMPTY),
        ("The final answer is: 70°.<|im_end|>", "70°", Rule.DECLARED),
        ("The final answer is: A. No: the final answer is: B", "B", Rule.DECLARED),
        ("**Final Answer:** 12", "12", Rule.DECLARED),
        ("So the correct answer is:\n\nC\n", "C", Rule.DECLARED),
        ("The best choice is **(D) picture D**", "(D) picture D", Rule.DECLARED),
        ("Answer: yes\nbecause I see it", "yes", Rule.DECLARED),
        ("The final answer is: up<|latent_start|><|latent_pad|><|latent_end|>", "up", Rule.DECLARED),
        ("The final answer is:", None, Rule.EMPTY),
        ("B", "B", Rule.BARE),
        ("I look.<|latent_start|><|latent_pad|><|latent_end|> B", "B", Rule.BARE),
        ("I look. ⟦8 latents⟧ B", "B", Rule.BARE),
        ("", None, Rule.EMPTY),
        ("<|im_end|>", None, Rule.EMPTY),
    ],
)
def test_rules(output, value, rule):
    found = extract.extract(output)
    assert (found.value, found.rule) == (value, rule)


def test_an_unanswered_question_declares_nothing():
    assert extract.extract("I must find the answer. There is an answer in the picture").rule is Rule.BARE


@settings(deadline=None, max_examples=400)
@given(TEXTS)
def test_what_is_extracted_is_in_the_text(output):
    """Any text: no crash, and the value is the stretch of the output that it says it is."""
    options = {"A": "the first image", "B": "12/02"}
    for found in (
        extract.extract(output),
        matching.short_answer(output),
        published.published_extract(output),
        choices.choose(output, options).found,
        choices.choose(output, {}).found,
    ):
        if found.value is not None:
            assert found.value != ""
            assert output[found.start : found.end] == found.value
            assert found.end <= extract.end_of_turn(output)


@settings(deadline=None, max_examples=200)
@given(TEXTS, TEXTS)
def test_comparisons_never_crash_and_are_symmetric(first, second):
    assert matching.same_answer(first, second) == matching.same_answer(second, first)
    assert published.published_same(first, second) == published.published_same(second, first)
    if matching.normalise(first):
        assert matching.same_answer(first, first)


def test_extraction_is_linear_in_the_text():
    """A long output of nothing but openings: quadratic work would take minutes."""
    for piece in ("\\boxed{", "{", "\\text{", "the answer is ", "\n", "((", "(A) ", "d, "):
        text = piece * 100_000
        extract.extract(text)
        published.published_extract(text)
        choices.choose(text, {"A": "the first image", "B": "the second image"})
        choices.parse_options(text)
        paths.parse_path(text)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2", "2.0", True),
        ("1,200", "1200", True),
        ("-.5", "−0.50", True),
        ("12/02", "02/12", False),
        ("10", "10%", False),
        ("x²", "x2", False),
        ("A knife.", "a  knife", True),
        ("Café", "Cafe\u0301", True),
        ("", "", False),
        ("1e3", "1000", False),
        ("nan", "nan", True),
        ("12", "1 2", False),
    ],
)
def test_same_answer(first, second, same):
    assert matching.same_answer(first, second) is same


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # roots p of n(p − k/n)² = z²p(1−p), solved with 50 digits
        (0, 10, 0.0, 0.2775327998628892),
        (10, 10, 0.7224672001371108, 1.0),
        (5, 10, 0.236593090512564, 0.763406909487436),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(correct, total, low, high):
    assert intervals.wilson(correct, total) == pytest.approx((low, high), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_holds_the_share_and_mirrors(correct, total):
    correct = min(correct, total)
    low, high = intervals.wilson(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high
    mirrored = intervals.wilson(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="impossible"):
        intervals.wilson(3, 2)
