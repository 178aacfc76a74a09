"""Readers: what a good line becomes, and the reason, id and field of every bad one."""

import json
from pathlib import Path

import pytest

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats import line_parser
from ilvr_ds.data.formats.jsonl import Line, read_lines
from ilvr_ds.errors import RecordError

MIRAGE = {
    "text_input": "Look: <image> Go.",
    "image_input": "a.png",
    "text_output": "Hm <output_image>A",
    "image_output": ["h.png"],
}


def parse(record, name="ilvr"):
    content = record if isinstance(record, bytes) else json.dumps(record).encode()
    return line_parser(name)(Line(Path("some/file.jsonl"), 7, 0, content))


def refused(record, name="ilvr") -> RecordError:
    with pytest.raises(RecordError) as error:
        parse(record, name)
    assert error.value.origin == "some/file.jsonl:7"
    assert "some/file.jsonl:7" in str(error.value)
    return error.value


def test_ilvr_images_come_first_or_at_their_markers(good_record):
    record = parse(good_record(image_input=["a.png", "b.png"], map_desc=[[1, 0], [-1, 2]]))
    assert record.prompt == (ImageRef("a.png"), ImageRef("b.png"), "What is the good?")
    assert record.steps == ("First.", ImageRef("b.png"), "The final answer is: A")
    assert (record.id, record.answer, record.map_desc) == ("good", "A", ((1, 0), (-1, 2)))
    marked = parse(good_record(image_input=["a.png", "b.png"], text_input="x <image><image> y"))
    assert marked.prompt == ("x ", ImageRef("a.png"), ImageRef("b.png"), " y")
    assert parse(good_record(image_input=[])).prompt == ("What is the good?",)


def test_mirage_markers():
    record = parse(MIRAGE, "mirage")
    assert record.prompt == ("Look: ", ImageRef("a.png"), " Go.")
    assert record.steps == ("Hm ", ImageRef("h.png"), "A")
    assert record.id == "file-7"
    assert record.answer is None


def test_ids(good_record):
    assert parse(good_record(id=12)).id == "12"
    assert parse(good_record(id=None)).id == "file-7"
    for value in (1.5, True, ["a"], ""):
        assert refused(good_record(id=value)).field == "id"


@pytest.mark.parametrize("field", ["text_input", "image_input", "sequence_plan", "original_final_answer"])
def test_missing_and_mistyped_fields_of_ilvr(good_record, field):
    record = good_record()
    del record[field]
    error = refused(record)
    assert (error.reason, error.field, error.record_id) == ("missing_field", field, "good")
    error = refused(good_record(**{field: 3}))
    assert (error.reason, error.field) == ("wrong_type", field)


@pytest.mark.parametrize("field", list(MIRAGE))
def test_missing_and_mistyped_fields_of_mirage(field):
    assert refused({k: v for k, v in MIRAGE.items() if k != field}, "mirage").reason == "missing_field"
    assert refused({**MIRAGE, field: {"x": 1}}, "mirage").reason == "wrong_type"


@pytest.mark.parametrize(
    ("step", "reason", "field"),
    [
        ({"type": "latent"}, "missing_helper_image", "sequence_plan[1].helper_image"),
        ({"type": "latent", "helper_image": None}, "missing_helper_image", "sequence_plan[1].helper_image"),
        ({"type": "latent", "helper_image": 4}, "wrong_type", "sequence_plan[1].helper_image"),
        ({"type": "sketch", "content": "x"}, "unknown_step_type", "sequence_plan[1].type"),
        ({"content": "x"}, "unknown_step_type", "sequence_plan[1].type"),
        ({"type": "text"}, "missing_field", "sequence_plan[1].content"),
        ({"type": "text", "content": None}, "wrong_type", "sequence_plan[1].content"),
        ("text", "wrong_type", "sequence_plan[1]"),
        ({"type": "text", "content": "\ud800"}, "bad_unicode", "sequence_plan[1].content"),
    ],
)
def test_bad_steps(good_record, step, reason, field):
    error = refused(good_record(sequence_plan=[{"type": "text", "content": "ok"}, step]))
    assert (error.reason, error.field, error.record_id) == (reason, field, "good")


@pytest.mark.parametrize("plan", [[], [{"type": "text", "content": ""}]])
def test_nothing_to_learn(good_record, plan):
    assert refused(good_record(sequence_plan=plan)).reason == "empty_steps"
    assert refused({**MIRAGE, "text_output": "", "image_output": []}, "mirage").reason == "empty_steps"


def test_marker_counts(good_record):
    assert refused(good_record(text_input="<image><image>")).reason == "marker_count"
    assert refused({**MIRAGE, "image_input": ["a", "b"]}, "mirage").field == "text_input"
    assert refused({**MIRAGE, "image_output": []}, "mirage").field == "text_output"


@pytest.mark.parametrize("rows", [[], [[]], [[1, 3]], [[1], [0, 2]], [[True]], "1", [1]])
def test_bad_maps(good_record, rows):
    assert refused(good_record(map_desc=rows)).field == "map_desc"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"id": "a"', "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"x": ' + b"9" * 5000 + b"}", "broken_json"),
        (b"", "broken_json"),
        (b"[1]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"id": "\xff"}', "not_utf8"),
    ],
)
def test_bad_lines(content, reason):
    assert refused(content).reason == reason


def test_empty_path_and_bad_text(good_record):
    assert refused(good_record(image_input="")).reason == "missing_image"
    assert refused(good_record(image_input=["a.png", 3])).field == "image_input[1]"
    assert refused(good_record(text_input="\udcff")).reason == "bad_unicode"


def test_read_lines_keeps_numbers_and_offsets(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"b": 2}\n{"c": "\xe2\x80\xa8"}\n\n  \n')
    lines = list(read_lines(path))
    assert [line.number for line in lines] == [1, 2, 3, 4]  # the blank line between counts, those at the end do not
    content = path.read_bytes()
    for line in lines:
        assert content[line.offset :].startswith(line.content)
    path.write_bytes(b"")
    assert list(read_lines(path)) == []


def test_byte_order_mark_is_not_part_of_the_first_line(tmp_path, good_record):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(good_record()).encode())
    assert line_parser("ilvr")(next(read_lines(path))).id == "good"


def test_real_records(realdata):
    for path, name, count in ((realdata / "mirage/examples.jsonl", "mirage", 10),
                              (realdata / "mvot/episodes.jsonl", "ilvr", 18)):  # fmt: skip
        records = [line_parser(name)(line) for line in read_lines(path)]
        assert len(records) == len({record.id for record in records}) == count
        assert all(any(isinstance(step, ImageRef) for step in record.steps) for record in records)
