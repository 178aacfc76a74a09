"""Task files: what each reader makes of them, and what it refuses."""

import json

import pytest

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats import ilvr_jsonl
from ilvr_ds.data.formats.jsonl import read_lines
from ilvr_ds.errors import RecordError
from ilvr_ds.inference.tasks import task_named
from ilvr_ds.inference.tasks.task import Rules

MAP = [[2, -1, 1], [0, 0, 0], [0, 0, 0]]
GOOD = {
    "vsp": {"text_input": "Map: <image> Plan?", "image_input": "a.png", "map_id": "31", "map_desc": MAP},
    "ilvr": {
        "id": "q", "text_input": "Which?\nA. left\nB. right", "image_input": ["a.png"],
        "original_final_answer": "right",
    },
    "comt": {
        "id": "creation-1", "type": "creation", "question": "How much?", "option": ["20°", "70°"], "answer": "B",
        "image": {"IMAGE0": "10003", "IMAGE1": "9"},
    },
    "zebra": {
        "id": "z", "Question": "Look: <image_start>[problem_image_2]<image_end> When?", "problem_image_1": "a.png",
        "problem_image_2": {"path": "b.png"}, "problem_image_3": None, "Final Answer": "12/02", "category": "Dates",
        "Text Reasoning Trace": "secret", "reasoning_image_1": "c.png",
    },
}  # fmt: skip


def write(tmp_path, *trees):
    path = tmp_path / "task.jsonl"
    path.write_text("".join((tree if isinstance(tree, str) else json.dumps(tree)) + "\n" for tree in trees))
    return path


def read(name, tmp_path, *trees):
    return task_named(name).read(write(tmp_path, *trees), tmp_path)


def test_vsp(tmp_path):
    [example] = read("vsp", tmp_path, GOOD["vsp"])
    assert example.prompt == ("Map: ", ImageRef("a.png"), " Plan?")
    assert (example.id, example.group, example.images) == ("level3/31", "level 3", ("a.png",))
    judge = task_named("vsp").judge
    assert judge(example, "\\boxed{D, L, L, U}", Rules()).correct
    lost = judge(example, "\\boxed{down, left and left, up, then D}", Rules())
    assert (lost.correct, lost.outcome, lost.extraction, lost.rule) == (False, "not_reached", "DLLUD", "boxed")
    assert judge(example, "\\boxed{DLLUD}", Rules(goal="original")).correct
    prose = judge(example, "Go down, then left twice and up.", Rules())
    assert (prose.outcome, prose.extraction) == ("no_plan", None)
    lax = "\\boxed{D JUMP LLU}"  # D, U of JUMP, L, L, U: their letters, not a plan
    assert judge(example, lax, Rules()).outcome == "no_plan"
    assert judge(example, lax, Rules(published=True)).extraction == "DULLU"


def test_ilvr_questions(tmp_path):
    [example] = read("ilvr", tmp_path, GOOD["ilvr"] | {"type": "creation"})
    assert (example.options, example.answer, example.group) == ({"A": "left", "B": "right"}, "right", "creation")
    judge = task_named("ilvr").judge
    for output in ("\\boxed{B}", "The final answer is: right", "The final answer is: (B) right", "B"):
        assert judge(example, output, Rules()).correct, output
    assert judge(example, "The final answer is: A", Rules()).outcome == "wrong"
    assert (
        judge(example, "The final answer is: B", Rules(published=True)).outcome == "wrong"
    )  # letter is not text there
    nothing = judge(example, "It goes right, I think.", Rules())
    assert (nothing.outcome, nothing.extraction) == ("no_answer", None)


def test_a_short_answer_where_no_options_are_listed(tmp_path):
    [example] = read("ilvr", tmp_path, GOOD["ilvr"] | {"text_input": "How many?", "original_final_answer": 2})
    judge = task_named("ilvr").judge
    assert judge(example, "first \\boxed{3}, finally \\boxed{2.0}", Rules()).correct
    assert judge(example, "The final answer is: 3", Rules()).outcome == "wrong"


def test_prompts_are_those_of_training(realdata):
    """The question of a record stands in the same order, image places included, when it is trained and when asked."""
    path = realdata / "mvot/episodes.jsonl"
    records = [ilvr_jsonl.parse_line(line) for line in read_lines(path)]
    examples = task_named("ilvr").read(path, path.parent)
    assert [example.prompt for example in examples] == [record.prompt for record in records]
    assert len(examples) == 18 and all(example.options for example in examples if "A. " in str(example.prompt))


def test_marked_prompts_are_those_of_training(tmp_path):
    tree = GOOD["ilvr"] | {"text_input": "<image> then <image>?", "image_input": ["a.png", "b.png"]}
    tree["sequence_plan"] = [{"type": "text", "content": "x"}]
    [example] = read("ilvr", tmp_path, tree)
    [record] = [ilvr_jsonl.parse_line(line) for line in read_lines(tmp_path / "task.jsonl")]
    assert example.prompt == record.prompt == (ImageRef("a.png"), " then ", ImageRef("b.png"), "?")


def test_answers_of_the_records_are_judged_right(realdata):
    """The reference reasoning of every record, given as the output, is judged correct."""
    path = realdata / "mvot/episodes.jsonl"
    task = task_named("ilvr")
    for example, line in zip(task.read(path, path.parent), read_lines(path), strict=True):
        record = ilvr_jsonl.parse_line(line)
        output = "".join("<|latent_start|><|latent_end|>" if isinstance(s, ImageRef) else s for s in record.steps)
        assert task.judge(example, output, Rules()).correct, output


def test_comt(tmp_path):
    (tmp_path / "images/creation").mkdir(parents=True)
    (tmp_path / "images/creation/10003.jpg").touch()
    second = GOOD["comt"] | {"id": "b", "image": "{'IMAGE0': 10004}"}
    first, second = read("comt", tmp_path, GOOD["comt"], second)
    assert first.images == ("images/creation/10003.jpg",)
    assert second.images == ("images/creation/10004.png",)
    assert isinstance(first.prompt[0], ImageRef)
    assert "A. 20°\nB. 70°\n" in first.prompt[1]
    judge = task_named("comt").judge
    assert judge(first, "The final answer is: 70°", Rules()).correct
    assert judge(first, "\\boxed{\\text{B}}", Rules()).correct
    assert not judge(first, "\\boxed{A}", Rules()).correct


def test_zebra(tmp_path):
    [example] = read("zebra", tmp_path, GOOD["zebra"])
    assert example.prompt == (ImageRef("a.png"), "Look: ", ImageRef("b.png"), " When?")
    assert (example.answer, example.group) == ("12/02", "Dates")
    judge = task_named("zebra").judge
    assert judge(example, "The final answer is: 12/02<|im_end|>", Rules()).correct
    assert not judge(example, "The final answer is: 02/12", Rules()).correct


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "empty_file"),
        (["", ""], "empty_file"),
        (["{"], "broken_json"),
        (["[]"], "not_an_object"),
        (["{}"], "missing_field"),
        ([b"\xff\xfe"], "not_utf8"),
        (["GOOD", "GOOD"], "duplicate_id"),
        (["GOOD", "", "GOOD"], "broken_json"),
    ],
)
def test_wrong_files(name, content, reason, tmp_path):
    path = tmp_path / "task.jsonl"
    good = json.dumps(GOOD[name])
    lines = [line if isinstance(line, bytes) else line.replace("GOOD", good).encode() for line in content]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(RecordError) as caught:
        task_named(name).read(path, tmp_path)
    assert caught.value.reason == reason
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecordError, match=r"absent\.jsonl: cannot read the task file"):
        task_named("vsp").read(tmp_path / "absent.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "reason", "field"),
    [
        ("vsp", {"map_desc": [[1, 2], [0]]}, "bad_map", "map_desc"),
        ("vsp", {"map_desc": [[1, 0], [0, 0]]}, "bad_map", "map_desc"),
        ("vsp", {"image_input": []}, "marker_count", "text_input"),
        ("vsp", {"image_input": ""}, "missing_image", "image_input"),
        ("ilvr", {"original_final_answer": " "}, "missing_answer", "original_final_answer"),
        ("ilvr", {"original_final_answer": None}, "wrong_type", "original_final_answer"),
        ("ilvr", {"text_input": "<image> <image>"}, "marker_count", "text_input"),
        ("comt", {"answer": "C"}, "bad_answer", "answer"),
        ("comt", {"option": "20°"}, "wrong_type", "option"),
        ("comt", {"image": "open('x')"}, "wrong_type", "image"),
        ("comt", {"image": {}}, "missing_image", "image"),
        ("comt", {"image": {"IMAGE0": ""}}, "missing_image", "image.IMAGE0"),
        ("zebra", {"problem_image_2": None}, "marker_count", "Question"),
        ("zebra", {"problem_image_1": {}}, "wrong_type", "problem_image_1.path"),
        ("zebra", {"Final Answer": ""}, "missing_answer", "Final Answer"),
    ],
)
def test_wrong_records(name, change, reason, field, tmp_path):
    with pytest.raises(RecordError) as caught:
        read(name, tmp_path, GOOD[name] | change)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert "task.jsonl:1" in str(caught.value)


def test_the_official_test_set(realdata):
    """400 maps, 100 a level; every shortest plan counts, every image is there."""
    from ilvr_ds.data.frozenlake import shortest_plan
    from ilvr_ds.inference.evaluate import find_missing_images

    folder = realdata / "vsp_planning_test"
    task = task_named("vsp")
    examples = task.read(folder / "test.jsonl", folder)
    levels = [example.group for example in examples]
    assert {level: levels.count(level) for level in levels} == {f"level {n}": 100 for n in (3, 4, 5, 6)}
    assert find_missing_images(examples, folder) == {}
    for rules in (Rules(), Rules(goal="original"), Rules(published=True)):
        for example in examples:
            plan = ", ".join(shortest_plan(example.map_desc))
            assert task.judge(example, f"So: \\boxed{{{plan}}}", rules).correct
