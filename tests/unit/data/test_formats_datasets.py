"""Published data sets: what a record of each becomes, and how each way of being wrong is named."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.formats import FORMAT_NAMES, line_parser, record_parser
from ilvr_ds.data.formats.jsonl import Fields, read_lines
from ilvr_ds.data.formats.source import open_source
from ilvr_ds.data.frozenlake import simulate
from ilvr_ds.errors import RecordError


def picture(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


COMT = {
    "id": "creation-1",
    "type": "creation",
    "question": "How wide?",
    "option": ["20°", "70°"],
    "answer": "B",
    "rationale": "Draw a line. <IMAGE1> It is right. ",
    "image": {"IMAGE0": "1", "IMAGE1": 2},
}
ZEBRA = {
    "Question": "See <image_start>[problem_image_1]<image_end> now?",
    "Text Reasoning Trace": "THOUGHT 0: cut <image_start>[reasoning_image_1]<image_end>\nTHOUGHT 1: done",
    "Final Answer": "C",
    "problem_image_1": {"bytes": picture(), "path": None},
    "problem_image_2": None,
    "reasoning_image_1": picture(1),
}
VSP = {
    "text_input": "Here: <image> Plan?",
    "image_input": "31.png",
    "map_id": "31",
    "map_desc": [[2, -1, 1], [0, 0, 0], [0, 0, 0]],
}
M3COT = {
    "id": "physics-1",
    "question": "Which?",
    "choices": ["salty", "fuzzy"],
    "context": "Look.",
    "answer": "B",
    "image_id": "9",
    "rationale": "Fur is fuzzy.",
}
SCIENCEQA = {
    "id": "7",
    "question": "Which?",
    "choices": ["no", "yes"],
    "answer": 1,
    "hint": "A hint.",
    "image": "image.png",
    "split": "train",
    "lecture": "L",
    "solution": "S",
}
GOOD = {"comt": COMT, "zebra": ZEBRA, "vsp": VSP, "m3cot": M3COT, "scienceqa": SCIENCEQA}


def parse(name: str, changes: dict | None = None, without: str | None = None) -> Record:
    tree = {**GOOD[name], **(changes or {})}
    if without:
        del tree[without]
    return record_parser(name)(Fields(tree, "some/file.jsonl:7", str(tree.get("id", "file-7"))))


def refused(name: str, changes: dict | None = None, without: str | None = None) -> RecordError:
    with pytest.raises(RecordError) as error:
        parse(name, changes, without)
    assert error.value.origin == "some/file.jsonl:7" and error.value.record_id
    return error.value


def test_comt():
    record = parse("comt")
    assert record.prompt == (ImageRef("images/creation/1.*"), "How wide?\n(A) 20°\n(B) 70°")
    helper = ImageRef("images/creation/2.*")
    assert record.steps == ("Draw a line. ", helper, " It is right.\n", "The final answer is: 70°")
    assert (record.id, record.answer) == ("creation-1", "70°")
    assert parse("comt", {"image": repr(COMT["image"])}) == record
    assert parse("comt", {"image": ["1", 2]}) == record
    assert parse("comt", {"image": "['1', 2]"}) == record
    for mark in ("IMAGE1", "[IMAGE1]", "{IMAGE1}", "(IMAGE1)"):
        assert parse("comt", {"rationale": COMT["rationale"].replace("<IMAGE1>", mark)}) == record
    named = parse("comt", {"image": {"IMAGE0": "images_comt/creation/1.png", "IMAGE1": picture()}})
    assert named.prompt[0] == ImageRef("images_comt/creation/1.png")
    assert named.steps[1].content == picture()


def test_comt_question_picture_may_be_the_helper_and_text_may_be_alone():
    again = parse("comt", {"rationale": "Look: <IMAGE0> twice <IMAGE0>.", "image": {"IMAGE0": "1"}})
    assert sum(step == ImageRef("images/creation/1.*") for step in again.steps) == 2
    alone = parse("comt", {"rationale": "Words.", "image": {"IMAGE0": "1"}})
    assert alone.steps == ("Words.\n", "The final answer is: 70°")


def test_zebra():
    record = parse("zebra")
    assert record.prompt == ("See ", ImageRef("problem_image_1", picture()), " now?")
    drawn = ImageRef("reasoning_image_1", picture(1))
    assert record.steps == ("THOUGHT 0: cut ", drawn, "\nTHOUGHT 1: done\n", "The final answer is: C")
    assert record.answer == "C"
    many = {f"problem_image_{i}": picture(i) for i in (1, 2, 10)}
    first, second, *_ = parse("zebra", {**many, "Question": "Q?"}).prompt
    assert [p.path for p in (first, second)] == ["problem_image_1", "problem_image_2"]
    assert [p.path for p in parse("zebra", many).prompt if isinstance(p, ImageRef)] == [
        "problem_image_2", "problem_image_10", "problem_image_1"
    ]  # fmt: skip
    bare = parse("zebra", {"Text Reasoning Trace": "see [problem_image_1], cut [reasoning_image_1]"})
    assert [s.path for s in bare.steps if isinstance(s, ImageRef)] == ["problem_image_1", "reasoning_image_1"]


def test_zebra_images_with_one_name_are_all_kept():
    """The hub's struct may carry the same path for every image."""
    images = {f"problem_image_{i}": {"bytes": picture(i), "path": "image.png"} for i in (1, 2)}
    prompt = parse("zebra", images).prompt
    assert [p.content for p in prompt if isinstance(p, ImageRef)] == [picture(2), picture(1)]


def test_vsp_plans_are_shortest_and_safe_and_drawn():
    record = parse("vsp")
    assert record.prompt == ("Here: ", ImageRef("31.png"), " Plan?")
    assert simulate(record.map_desc, record.answer.split(",")).outcome == "success"
    assert record.answer == "D,L,L,U"
    helpers = [step for step in record.steps if isinstance(step, ImageRef)]
    assert len(helpers) == 2 and all(Image.open(io.BytesIO(h.content())).size == (192, 192) for h in helpers)
    assert record.steps[-1] == "The final answer is: \\boxed{D,L,L,U}"
    assert parse("vsp") == record
    drawn = parse("vsp", without="image_input")
    assert Image.open(io.BytesIO(drawn.prompt[1].content())).size == (192, 192)


def test_m3cot():
    record = parse("m3cot")
    question = "[Context]\nLook.\n[Question]\nWhich?\n[Choices]\n(A) salty\n(B) fuzzy"
    assert record.prompt == (ImageRef("images/physics-1.*"), question)
    assert record.steps == ("Fur is fuzzy.\n", "The final answer is: fuzzy")
    assert parse("m3cot", {"context": ""}).prompt[1].startswith("[Question]")
    assert parse("m3cot", {"image": picture()}).prompt[0].content == picture()
    for changes in ({"image": None}, {"image_id": ""}, {"image_id": None}):
        assert parse("m3cot", changes).prompt == (question,)
    assert parse("m3cot", without="rationale").steps == ("The final answer is: fuzzy",)
    assert parse("m3cot", {"messages": ["q", "(A) a model's answer"]}) == record


def test_scienceqa():
    record = parse("scienceqa")
    assert record.prompt == (ImageRef("images/train/7/image.png"), "Context: A hint.\nWhich?\n(A) no\n(B) yes")
    assert record.steps == ("L\n", "S\n", "The final answer is: yes")
    assert parse("scienceqa", {"image": None}).prompt == ("Context: A hint.\nWhich?\n(A) no\n(B) yes",)
    assert parse("scienceqa", {"image": {"bytes": picture(), "path": "x"}}, without="split").prompt[0].path == "x"
    assert parse("scienceqa", {"lecture": "", "solution": None}).steps == ("The final answer is: yes",)


@pytest.mark.parametrize(
    ("name", "changes", "reason", "field"),
    [
        ("comt", {"answer": "C"}, "bad_answer", "answer"),
        ("comt", {"option": ["x"]}, "wrong_type", "option"),
        ("comt", {"option": ["x", 3]}, "wrong_type", "option[1]"),
        ("comt", {"rationale": " "}, "empty_steps", "rationale"),
        ("comt", {"rationale": "no mark"}, "marker_count", "rationale"),
        ("comt", {"rationale": "<IMAGE1> <IMAGE7>"}, "marker_count", "rationale"),
        ("comt", {"image": "{'IMAGE0':"}, "wrong_type", "image"),
        ("comt", {"image": "open('x')"}, "wrong_type", "image"),
        ("comt", {"image": {"IMAGE1": "2"}}, "missing_image", "image"),
        ("comt", {"image": {"picture": "2"}}, "wrong_type", "image"),
        ("comt", {"image": {"IMAGE0": 1.5}}, "wrong_type", "image.IMAGE0"),
        ("comt", {"image": {"IMAGE0": ""}}, "missing_image", "image.IMAGE0"),
        ("zebra", {"Question": "[problem_image_9]"}, "marker_count", "Question"),
        ("zebra", {"Text Reasoning Trace": "no mark"}, "marker_count", "Text Reasoning Trace"),
        ("zebra", {"Text Reasoning Trace": ""}, "empty_steps", "Text Reasoning Trace"),
        ("zebra", {"reasoning_image_1": None}, "marker_count", "Text Reasoning Trace"),
        ("zebra", {"reasoning_image_1": {"bytes": None, "path": None}}, "missing_image", "reasoning_image_1"),
        ("zebra", {"Final Answer": " "}, "missing_field", "Final Answer"),
        ("zebra", {"Final Answer": None}, "wrong_type", "Final Answer"),
        ("vsp", {"map_desc": [[1, 0], [0, 0]]}, "bad_map", "map_desc"),
        ("vsp", {"map_desc": [[1, 2, 0]]}, "bad_map", "map_desc"),
        ("vsp", {"map_desc": [[1, 7], [2, 0]]}, "wrong_type", "map_desc"),
        ("vsp", {"map_desc": None}, "bad_map", "map_desc"),
        ("vsp", {"map_desc": [[1, -1], [-1, 2]]}, "no_safe_plan", "map_desc"),
        ("vsp", {"image_input": ["a.png", "b.png"]}, "marker_count", "text_input"),
        ("m3cot", {"answer": "E"}, "bad_answer", "answer"),
        ("m3cot", {"choices": "ab"}, "wrong_type", "choices"),
        ("m3cot", {"context": 3}, "wrong_type", "context"),
        ("m3cot", {"rationale": ["x"]}, "wrong_type", "rationale"),
        ("scienceqa", {"answer": 2}, "bad_answer", "answer"),
        ("scienceqa", {"answer": True}, "bad_answer", "answer"),
        ("scienceqa", {"answer": "B"}, "bad_answer", "answer"),
        ("scienceqa", {"image": 4}, "wrong_type", "image"),
        ("scienceqa", {"solution": 4}, "wrong_type", "solution"),
    ],
)
def test_every_wrong_field_is_named(name, changes, reason, field):
    error = refused(name, changes)
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *[("comt", field) for field in COMT if field != "id"],
        *[("zebra", field) for field in ("Question", "Text Reasoning Trace", "Final Answer")],
        *[("vsp", field) for field in ("text_input", "map_desc")],
        *[("m3cot", field) for field in ("id", "question", "choices", "answer", "image_id")],
        *[("scienceqa", field) for field in ("question", "choices", "answer", "image", "split")],
    ],
)
def test_every_missing_field_is_named(name, field):
    error = refused(name, without=field)
    assert (error.reason, error.field) == ("missing_field", field)


def test_images_in_every_form(good_record):
    content = picture()
    text = base64.b64encode(content).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for value in (f"data:image/png;base64,{text}", text, wrapped, {"bytes": text}, {"bytes": content}, content,
                  f"DATA:image/png;charset=utf-8;BASE64,{text}"):  # fmt: skip
        fields = Fields(good_record(image_input=value), "f:1", "good")
        [image] = [part for part in record_parser("ilvr")(fields).prompt if isinstance(part, ImageRef)]
        assert (image.content, image.path) == (content, "image_input")
    for value in ("a.png", {"path": "a.png"}, {"path": "a.png", "bytes": None}):
        assert record_parser("ilvr")(Fields(good_record(image_input=value), "f:1", "g")).prompt[0] == ImageRef("a.png")
    long = "a/" * 49 + "bb"  # decodes as base64, and is a path
    assert record_parser("ilvr")(Fields(good_record(image_input=long), "f:1", "g")).prompt[0] == ImageRef(long)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("data:image/png,raw", "bad_base64"),
        ("data:image/png;base64,a", "bad_base64"),
        ("data:image/png;base64,\u00e9", "bad_base64"),
        ({"bytes": "%%%"}, "bad_base64"),
        ({"bytes": 3}, "wrong_type"),
        ({"path": 3}, "wrong_type"),
        ({"path": ""}, "wrong_type"),
        ({}, "wrong_type"),
        (3, "wrong_type"),
        (None, "wrong_type"),
    ],
)
def test_images_in_no_form(value, reason, good_record):
    with pytest.raises(RecordError) as error:
        record_parser("ilvr")(Fields(good_record(image_input=[value]), "f:1", "good"))
    assert (error.value.reason, error.value.field) == (reason, "image_input[0]")


def test_zebra_from_a_real_parquet_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    trees = [ZEBRA, {**ZEBRA, "Final Answer": None}, {**ZEBRA, "problem_image_1": None}]
    columns = {name: [tree[name] for tree in trees] for name in ZEBRA}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train-00000.parquet")
    items = list(open_source(tmp_path / "train-00000.parquet", "zebra", tmp_path).read(0, 3))
    assert items[0].prompt == parse("zebra").prompt and items[0].steps == parse("zebra").steps
    assert items[0].id == "train-00000-1"
    assert [(item.reason, item.field) for item in items[1:]] == [
        ("wrong_type", "Final Answer"), ("marker_count", "Question")
    ]  # fmt: skip


def test_every_format_refuses_what_is_no_record(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n[]\nx\n")
    for name in FORMAT_NAMES:
        for line in read_lines(path):
            with pytest.raises(RecordError):
                line_parser(name)(line)


def test_real_records_of_every_data_set(realdata, tmp_path):
    """Text-only releases and the VSP test set: every record parses."""
    for path, name, count in (
        ("m3cot/test_text_100.jsonl", "m3cot", 100),
        ("scienceqa/problems_100.json", "scienceqa", 100),
        ("vsp_planning_test/test.jsonl", "vsp", 400),
    ):
        source = open_source(realdata / path, name, tmp_path)
        items = list(source.read(0, len(source)))
        assert len(items) == count and all(isinstance(item, Record) for item in items), name
    problems = json.loads((realdata / "scienceqa/problems_100.json").read_text())
    items = list(open_source(realdata / "scienceqa/problems_100.json", "scienceqa", tmp_path).read(0, 100))
    assert [item.id for item in items] == list(problems)
    assert [item.answer for item in items] == [p["choices"][p["answer"]] for p in problems.values()]
