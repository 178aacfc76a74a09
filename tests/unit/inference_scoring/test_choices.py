"""Multiple choice: options in a question, and the option chosen."""

import pytest

from ilvr_ds.inference.scoring.choices import choose, parse_options, read_choice, reference_letter
from ilvr_ds.inference.scoring.published import published_extract, published_same

IMAGES = {"A": "the second image", "B": "the third image"}
DEGREES = {"A": "20°", "B": "30°", "C": "60°", "D": "70°"}


@pytest.mark.parametrize(
    ("value", "options", "letter"),
    [
        ("B", {}, "B"),
        ("b", {}, "B"),
        ("(B)", {}, "B"),
        ("B.", {}, "B"),
        ("**\\text{B}**", {}, "B"),
        ("Option B", {}, "B"),
        ("(B) the third image", IMAGES, "B"),
        ("B. the third image", IMAGES, "B"),
        ("B: because it fits", IMAGES, "B"),
        ("option B, the third image", IMAGES, "B"),
        ("The Third  image.", IMAGES, "B"),
        ("70°", DEGREES, "D"),
        ("2.0", {"A": "1", "B": "2"}, "B"),
        ("E", IMAGES, None),  # no such option
        ("(B) the second image", IMAGES, None),  # letter and text disagree
        ("(A) or (B)", IMAGES, None),
        ("A or B", IMAGES, None),
        ("not B", IMAGES, None),
        ("a third image", IMAGES, None),
        ("A knife", {}, None),
        ("Box", {"A": "Box", "B": "box"}, None),  # two options with this text
        ("", IMAGES, None),
    ],
)
def test_read_choice(value, options, letter):
    assert read_choice(value, options) == letter


@pytest.mark.parametrize(
    ("output", "options", "letter"),
    [
        ("\\boxed{B}", {}, "B"),
        ("Because A is wrong, the correct answer is:\n\n**(B) the third image**", IMAGES, "B"),
        ("(A) the second image\n\nThe third image shows a dog.", IMAGES, "A"),
        ("A: I see a dog.\nB: I see a cat.", IMAGES, None),  # options gone through, none chosen
        ("Look at the tail. The one that matches is: (B) the third image", IMAGES, "B"),
        ("The second image has the same colours.", IMAGES, "A"),
        ("The second image is unlike the third image.", IMAGES, None),
        ("The second image (B) is best.", IMAGES, None),
        ("A dog is on the left.", {"A": "left", "B": "right"}, None),  # one-word texts are not looked for in prose
        ("I think it may be (B) or not.", IMAGES, None),
        ("It cannot be said.", IMAGES, None),
        ("\\boxed{B", IMAGES, None),
        ("\\boxed{C} is what I would say, (A) the second image", IMAGES, None),  # a wrong box is final
        ("", {}, None),
    ],
)
def test_choose(output, options, letter):
    assert choose(output, options).letter == letter


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. 20°\nB. 30°\nC. 60°\nD. 70°\n", DEGREES),
        ("Which?\n(A) 20°\n(B) 30°\n(C) 60°\n(D) 70°", DEGREES),
        ("Which?\n A) 20°\n B: 30°\nC. 60°\nD. 70°\nThink.", DEGREES),
        ("A. only one", {}),
        ("A cat and B. dog", {}),
        ("In the example\nA. x\nB. y\nnow the question:\nA. 20°\nB. 30°\nC. 60°\nD. 70°", DEGREES),
        ("A. x\nB. y\nA. a stray line", {"A": "x", "B": "y"}),
        ("A. x\nC. y", {}),
        ("", {}),
    ],
)
def test_parse_options(question, options):
    assert parse_options(question) == options


def test_a_reference_is_a_text_before_it_is_a_letter():
    options = {"A": "B", "B": "A"}
    assert reference_letter("A", options) == "B"
    assert read_choice("A", options) == "A"
    assert reference_letter("70°", DEGREES) == reference_letter("D", DEGREES) == "D"
    assert reference_letter("80°", DEGREES) is None


def test_published_rules_are_laxer():
    """What the published scripts count and ours do not."""
    output = "true, I believe so"
    assert published_same(published_extract(output).value, "A")
    assert choose(output, {"A": "yes", "B": "no"}).letter is None
    assert published_extract("The answer: **2**.").value == "2"
