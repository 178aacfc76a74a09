"""What is kept of an assistant turn, and that shards say which part they hold."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.build_shards import main
from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.assistant_view import assistant_view
from ilvr_ds.data.frozenlake import MapSpec, make_maps
from ilvr_ds.data.frozenlake_records import puzzle_record
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.errors import RecordError

HELP = ImageRef("h.png")


def record(*steps) -> Record:
    return Record("a", ("question",), steps, "B", None, "f.jsonl:3")


def test_interleaved_is_the_record_itself():
    whole = record("x", HELP, "y")
    assert assistant_view(whole, "interleaved") is whole


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (("Right.", HELP, "Then down.", HELP, "B"), "Right. Then down. B"),
        (("Right. ", HELP, "Then."), "Right. Then."),
        (("Right.", HELP, "\nThen."), "Right.\nThen."),
        (("Right.", HELP, HELP, "", "Then."), "Right. Then."),
        ((HELP, "Then."), "Then."),
        (("Ri", "ght.", HELP), "Right."),  # neighbours without an image between them are one text
    ],
)
def test_text_is_everything_but_the_images(steps, text):
    seen = assistant_view(record(*steps), "text")
    assert seen.steps == (text,)
    assert (seen.id, seen.prompt, seen.answer, seen.origin) == ("a", ("question",), "B", "f.jsonl:3")


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        (("I look.", HELP, " The final answer is: B\n"), "The final answer is: B"),
        (("I look.\n\nSo it goes.\n\nThe answer is B. It is red.",), "The answer is B. It is red."),
        (("I look.\r\n\r\nB",), "B"),
    ],
)
def test_answer_is_the_last_paragraph_of_the_last_text(steps, answer):
    assert assistant_view(record(*steps), "answer").steps == (answer,)


@pytest.mark.parametrize(
    ("view", "steps", "reason"),
    [
        ("text", (HELP,), "no_text"),
        ("text", ("  ", HELP), "no_text"),
        ("answer", ("I look.", HELP), "no_final_answer"),
        ("answer", ("I look.", HELP, " \n\n "), "no_final_answer"),
    ],
)
def test_a_record_without_the_part_asked_for_is_refused_by_name(view, steps, reason):
    with pytest.raises(RecordError) as error:
        assistant_view(record(*steps), view)
    assert error.value.reason == reason
    assert "f.jsonl:3" in str(error.value) and "'a'" in str(error.value) and "--assistant" in str(error.value)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.just(HELP), st.text(alphabet="ab .\n", max_size=5)), max_size=6))
def test_no_letter_is_lost_or_made_up(steps):
    letters = lambda texts: "".join(c for t in texts for c in t if not c.isspace())  # noqa: E731
    try:
        seen = assistant_view(record(*steps), "text").steps
    except RecordError:
        seen = ()
    assert letters(seen) == letters(s for s in steps if isinstance(s, str))


def test_the_answer_of_a_puzzle_is_its_boxed_plan():
    for index, lake in enumerate(make_maps(MapSpec((3, 4), (0.2, 0.35), 0), 5)):
        fields = puzzle_record(lake, 0, index, 2).fields
        steps = tuple(s["content"] if s["type"] == "text" else HELP for s in fields["sequence_plan"])
        expected = f"The final answer is: \\boxed{{{fields['original_final_answer']}}}"
        assert assistant_view(record(*steps), "answer").steps == (expected,)


def test_shards_of_each_view(write_records, good_record, tokenizer_folder, tokenizer, tmp_path, capsys):
    no_answer = good_record("open", sequence_plan=[{"type": "latent", "helper_image": "b.png"}])
    source = write_records([good_record("a"), no_answer])

    def run(view: str, out: str) -> int:
        arguments = ["--input", source, "--tokenizer", tokenizer_folder, "--out", tmp_path / out, "--assistant", view]
        return main([str(a) for a in (*arguments, "--workers", 0)])

    texts = {}
    for view in ("interleaved", "text", "answer"):
        assert run(view, view) == 0
        shards = ShardSet.open(tmp_path / view)
        assert shards.manifest.assistant == view
        sample = shards.load_sample(0, tokenizer)
        texts[view] = tokenizer.decode([i for i in sample.input_ids.tolist()])
        assert int(shards.index[0]["spans"]) == (1 if view == "interleaved" else 0)
        assert len(sample.grids) == (2 if view == "interleaved" else 1)  # no helper image is stored that nobody sees
    assert texts["text"].endswith("First. The final answer is: A<|im_end|>\n")
    assert "First." not in texts["answer"] and texts["answer"].endswith("The final answer is: A<|im_end|>\n")
    for view, reason in (("text", "no_text"), ("answer", "no_final_answer")):
        (reject,) = [json.loads(line) for line in (tmp_path / view / "rejects.jsonl").read_text().splitlines()]
        assert (reject["id"], reject["reason"]) == ("open", reason)
    assert run("text", "answer") == 1
    assert "assistant: 'answer' there, 'text' now" in capsys.readouterr().err
