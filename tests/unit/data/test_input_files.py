"""Several files, a folder or a pattern as one input: which files, in which order, and the same records as one file."""

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.build_shards import main
from ilvr_ds.contracts import Record
from ilvr_ds.data.formats import parquet, vsp_maps
from ilvr_ds.data.formats.input_files import input_files, input_name
from ilvr_ds.data.formats.source import SourceList, open_source, open_sources
from ilvr_ds.errors import ConfigError, RecordError


def lines(trees) -> bytes:
    return b"".join(json.dumps(tree).encode() + b"\n" for tree in trees)


@pytest.fixture
def folder(tmp_path, good_record):
    """Three files of 2, 1 and 3 records, written in another order than that of their names; and one of another kind."""
    for name, ids in (("b-2.jsonl", "def"), ("a.jsonl", "ab"), ("b-10.jsonl", "c")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(lines(good_record(x) for x in ids))
    (tmp_path / "in" / "notes.md").write_text("not a record file")
    return tmp_path / "in"


def test_folders_and_patterns_are_sorted_and_lists_keep_their_order(folder, monkeypatch):
    names = ["a.jsonl", "b-10.jsonl", "b-2.jsonl"]
    assert [path.name for path in input_files([folder])] == names
    assert [path.name for path in input_files([folder / "b*.jsonl"])] == names[1:]
    assert [path.name for path in input_files([folder.parent / "**" / "*.jsonl"])] == names
    assert [path.name for path in input_files([folder / "b-2.jsonl", folder / "a.jsonl"])] == ["b-2.jsonl", "a.jsonl"]
    monkeypatch.chdir(folder)
    assert [str(path) for path in input_files([Path("b*.jsonl")])] == names[1:]
    (folder / "[x].jsonl").touch()  # a name, not a pattern
    assert input_files([folder / "[x].jsonl"]) == (folder / "[x].jsonl",)
    assert input_name(input_files([folder])) == "[x].jsonl ... b-2.jsonl (4 files)"
    assert input_name([folder / "a.jsonl"]) == "a.jsonl"


def test_inputs_that_are_unclear(folder):
    (folder / "more").mkdir()
    for given_paths, message in (
        ([folder / "a.jsonl", folder], "given twice"),
        ([folder / "none*.jsonl"], "no record files"),
        ([folder / "more"], "no record files"),
        ([folder / "none.jsonl"], "no such file"),
        ([folder / "*"], "unknown ending|given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            input_files(given_paths)
    (folder / "x.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"\.json, \.jsonl; name one kind"):
        input_files([folder])


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), data=st.data())
def test_a_list_of_files_is_their_records_in_order(tmp_path_factory, sizes, data):
    tmp_path = tmp_path_factory.mktemp("list")
    trees = [{"no": "record"} for _ in range(sum(sizes))]
    paths, end = [], 0
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_bytes(lines(trees[end : end + size]))
        end += size
    source = pickle.loads(pickle.dumps(open_sources(paths, "ilvr", tmp_path)))
    assert len(source) == end
    expected = [f"{path}:{row + 1}" for path, size in zip(paths, sizes, strict=True) for row in range(size)]
    start = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(start, end))
    assert [item.origin for item in source.read(start, stop)] == expected[start:stop]
    assert list(source.ids(start, stop)) == [None] * (stop - start)
    assert [source.origin(place) for place in range(end)] == expected
    with pytest.raises(IndexError):
        list(source.read(0, end + 1))


def test_ids_made_up_differ_between_files_of_one_name(tmp_path, good_record):
    tree = good_record()
    del tree["id"]
    for name in ("x/train.jsonl", "y/train.jsonl", "z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines([tree, tree]))
    different = open_sources([tmp_path / "x/train.jsonl", tmp_path / "z.jsonl"], "ilvr", tmp_path)
    assert list(different.ids(0, 4)) == ["train-1", "train-2", "z-1", "z-2"]
    same = open_sources([tmp_path / "x/train.jsonl", tmp_path / "y/train.jsonl"], "ilvr", tmp_path)
    assert [item.id for item in same.read(0, 4)] == list(same.ids(0, 4))
    assert list(same.ids(0, 4)) == ["x/train-1", "x/train-2", "y/train-1", "y/train-2"]
    (tmp_path / "x/train.json").write_text(json.dumps([tree]))
    with pytest.raises(ConfigError, match="x/train"):
        open_sources([tmp_path / "x/train.jsonl", tmp_path / "x/train.json"], "ilvr", tmp_path)


def test_the_hash_is_of_bytes_names_and_order(folder):
    files = input_files([folder])
    hashes = {open_sources(order, "ilvr", folder).sha256 for order in (files, files[::-1], files[:2])}
    assert len(hashes) == 3
    (folder / "b-2.jsonl").rename(folder / "c.jsonl")
    hashes.add(open_sources(input_files([folder]), "ilvr", folder).sha256)
    assert len(hashes) == 4
    assert open_sources(files[:1], "ilvr", folder).sha256 == hashlib.sha256(files[0].read_bytes()).hexdigest()


def test_built_from_several_files(folder, write_records, good_record, tokenizer_folder, tmp_path, capsys):
    """The bytes are those of one file with the same records, but for the origins; workers and jobs do not matter."""
    write_records([])  # the pictures
    (folder / "b-10.jsonl").write_bytes(lines([good_record("a"), good_record("c", image_input="none.png")]))

    def run(*options) -> int:
        fixed = ["--tokenizer", tokenizer_folder, "--image-root", tmp_path, "--samples-per-shard", 2]
        return main([str(option) for option in [*fixed, *options]])

    assert run("--input", folder, "--workers", 0, "--out", tmp_path / "one") == 0
    names = [folder / "a.jsonl", folder / "b-10.jsonl"]
    assert run("--input", *names, "--input", folder / "b-2.jsonl", "--workers", 2, "--out", tmp_path / "two") == 0
    for name in ("manifest.json", "index.npy", "rejects.jsonl", "shard-000003.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["source"] == "a.jsonl ... b-2.jsonl (3 files)" and manifest["built"] == 5
    duplicate, missing = [json.loads(line) for line in (tmp_path / "one" / "rejects.jsonl").read_text().splitlines()]
    assert duplicate["origin"] == f"{folder}/b-10.jsonl:1" and f"{folder}/a.jsonl:1, already" in duplicate["message"]
    assert missing["origin"] == f"{folder}/b-10.jsonl:2" and missing["reason"] == "missing_image"
    assert run("--input", *names[::-1], folder / "b-2.jsonl", "--workers", 0, "--out", tmp_path / "one") == 1
    assert "input sha256" in capsys.readouterr().err  # another order is another build
    moved = folder.parent / "elsewhere.jsonl"
    (folder / "a.jsonl").rename(moved)
    arguments = ["--tokenizer", tokenizer_folder, "--out", tmp_path / "three", "--input", moved, folder]
    assert main([str(option) for option in arguments]) == 1
    assert "--image-root" in capsys.readouterr().err


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def zebra_rows() -> list[dict]:
    """Good rows; an image too many, one too few, one that is there without bytes or path, one with a path alone."""
    mark = "<image_start>[reasoning_image_1]<image_end>"
    row = {"Question": "Q", "Text Reasoning Trace": f"T {mark} U", "Final Answer": "C", "problem_image_1": None}
    image = {"bytes": picture(), "path": None}
    rows = [{**row, "reasoning_image_1": image, "reasoning_image_2": None} for _ in range(20)]
    rows[3]["reasoning_image_2"] = image
    rows[4]["reasoning_image_1"] = None
    rows[5]["problem_image_1"] = image
    rows[6]["reasoning_image_1"] = {"bytes": None, "path": None}
    rows[7]["reasoning_image_1"] = {"bytes": None, "path": "x.png"}
    return rows


def test_ids_of_parquet_do_not_read_the_pictures(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(zebra_rows()), path, row_group_size=7)
    source = open_source(path, "zebra", tmp_path)
    items = list(source.read(0, 20))
    assert [isinstance(items[i], Record) for i in (2, 3, 4, 5, 6, 7)] == [True, False, False, True, False, True]
    ids = list(source.ids(0, 20))
    for place, (found, item) in enumerate(zip(ids, items, strict=True)):
        # bad for its image alone (place 6): it may have its id here
        assert found == (None if isinstance(item, RecordError) and place != 6 else f"train-{place + 1}")
    assert list(source.ids(6, 9)) == ids[6:9]
    seen = []
    real = parquet._row
    monkeypatch.setattr(parquet, "_row", lambda batch: seen.append(batch.nbytes) or real(batch))
    list(source.ids(0, 20))
    assert len(seen) == 20 and sum(seen) < 20 * 400  # text; the picture has 120 kB
    seen.clear()
    list(source.read(0, 20))
    assert sum(seen) > 15 * 100_000


def test_lists_of_images_and_bare_bytes(tmp_path, good_record):
    """A list of {bytes, path} is left unread too; bytes in a column of their own are read, as null means absent."""
    rows = [good_record("a", image_input=[{"bytes": picture(), "path": None}] * 2), good_record("b", image_input=[])]
    plan = [{"type": "text", "content": "The final answer is: A"}]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "sequence_plan": plan} for row in rows]), path)
    source = open_source(path, "ilvr", tmp_path)
    assert not [leaf for leaf in source.light if leaf.endswith("bytes")]
    assert list(source.ids(0, 2)) == ["a", "b"] == [item.id for item in source.read(0, 2)]
    rows = [{**row, "reasoning_image_1": picture()} for row in zebra_rows()[:2]]
    rows[1]["reasoning_image_1"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(open_source(path, "zebra", tmp_path).ids(0, 2)) == ["x-1", None]


def test_ids_of_maps_draw_nothing(tmp_path, monkeypatch):
    tree = {"text_input": "Plan", "map_desc": [[2, -1, 1], [0, 0, 0], [0, 0, 0]]}
    (tmp_path / "x.jsonl").write_bytes(lines([tree, tree]))
    source = open_source(tmp_path / "x.jsonl", "vsp", tmp_path)
    monkeypatch.setattr(vsp_maps, "render", None)
    assert list(source.ids(0, 2)) == ["x-1", "x-2"]


def test_a_source_stays_small_however_many_lines(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" * 20_000 + b"\n" * 5000)
    source = open_source(tmp_path / "x.jsonl", "ilvr", tmp_path)
    assert len(source) == 20_000 and len(pickle.dumps(source)) < 1000
    (bad,) = source.read(19_999, 20_000)
    assert bad.origin == f"{tmp_path}/x.jsonl:20000"
    assert isinstance(open_sources([tmp_path / "x.jsonl"] * 1, "ilvr", tmp_path), type(source))
    assert not isinstance(source, SourceList)
