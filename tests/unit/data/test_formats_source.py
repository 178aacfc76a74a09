"""Input files of every layout: the same records, from any record on, and a clear end where the file is bad."""

import gzip
import io
import json
import pickle
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats.source import open_source
from ilvr_ds.errors import ConfigError, RecordError


@pytest.fixture
def trees(good_record):
    """Five records, the third without a question."""
    trees = [good_record(f"r{i}", text_input=f"What of {i}? \u2028 é") for i in range(5)]
    del trees[2]["text_input"]
    return trees


def jsonl(trees) -> bytes:
    return b"".join(json.dumps(tree, ensure_ascii=False).encode() + b"\n" for tree in trees)


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def array(trees) -> bytes:
    return b"\xef\xbb\xbf\n" + json.dumps(trees, indent=2, ensure_ascii=False).encode() + b"\n"


def by_id(trees) -> bytes:
    return json.dumps({tree["id"]: {k: v for k, v in tree.items() if k != "id"} for tree in trees}, indent=1).encode()


def parquet(trees, rows_per_group=2) -> bytes:
    buffer = io.BytesIO()
    names = dict.fromkeys(name for tree in trees for name in tree)
    table = pyarrow.table({name: [tree.get(name) for tree in trees] for name in names})
    pyarrow.parquet.write_table(table, buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


LAYOUTS = {
    "x.jsonl": jsonl,
    "x.jsonl.gz": lambda trees: gzip.compress(jsonl(trees)),
    "x.jsonl.zst": lambda trees: zst(jsonl(trees[:2])) + zst(jsonl(trees[2:])),  # two frames
    "x.json": array,
    "ids.json": by_id,
    "x.json.gz": lambda trees: gzip.compress(array(trees)),
    "x.json.zst": lambda trees: zst(by_id(trees)),
    "x.parquet": parquet,
}


def what(item) -> tuple:
    if isinstance(item, RecordError):
        return item.record_id, item.reason, item.field
    return item.id, item.prompt, item.steps, item.answer


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_gives_the_same_records(name, trees, tmp_path):
    path = tmp_path / name
    path.write_bytes(LAYOUTS[name](trees))
    (tmp_path / "plain.jsonl").write_bytes(jsonl(trees))
    expected = [what(item) for item in open_source(tmp_path / "plain.jsonl", "ilvr", tmp_path / "s").read(0, 5)]
    source = pickle.loads(pickle.dumps(open_source(path, "ilvr", tmp_path / "scratch")))
    assert len(source) == 5
    items = list(source.read(0, 5))
    assert [isinstance(item, Record) for item in items] == [True, True, False, True, True]
    got = [what(item) for item in items]
    if name.endswith(".parquet"):  # a column has no absent fields, only nulls
        assert got[2] == ("r2", "wrong_type", "text_input")
        got[2] = expected[2]
    assert got == expected
    assert [item.origin for item in items] == [f"{path}:{i + 1}" for i in range(5)]
    for start in range(6):
        for stop in range(start, 6):
            assert [what(item) for item in source.read(start, stop)] == [what(item) for item in items[start:stop]]
    with pytest.raises(IndexError):
        list(source.read(0, 6))


def test_sha256_is_of_the_bytes_given_and_a_second_opening_converts_nothing(trees, tmp_path):
    import hashlib

    path = tmp_path / "x.json.gz"
    path.write_bytes(LAYOUTS["x.json.gz"](trees))
    first = open_source(path, "ilvr", tmp_path / "scratch")
    assert first.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "scratch").iterdir()}
    assert {file.name.partition("-")[0] for file in made} == {"input", "lines"}
    assert len(open_source(path, "ilvr", tmp_path / "scratch")) == 5
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "scratch").iterdir()} == made


def test_default_ids_do_not_depend_on_compression(good_record, tmp_path):
    tree = good_record()
    del tree["id"]
    for name in ("x.jsonl", "x.jsonl.gz", "x.json", "x.parquet"):
        (tmp_path / name).write_bytes(LAYOUTS[name]([tree, tree]))
        assert [r.id for r in open_source(tmp_path / name, "ilvr", tmp_path / "s").read(0, 2)] == ["x-1", "x-2"]


@pytest.mark.parametrize("cut", [1, 20, 50, -1])
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json", "x.json.gz", "x.parquet"])
def test_files_cut_short_are_refused(name, cut, trees, tmp_path):
    path = tmp_path / name
    content = LAYOUTS[name](trees).rstrip()  # white space at the end of a JSON file may be lost
    path.write_bytes(content[:cut])
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        open_source(path, "ilvr", tmp_path / "scratch")
    assert list(tmp_path.glob("scratch/*")) == []


@pytest.mark.parametrize(
    "content", [b"", b"12", b'"a"', b"[{} {}]", b"[{},]", b"[{}] x", b'{"a" {}}', b"{1: {}}", b"[" * 100_000, b"[\xff]"]
)
def test_what_is_no_json_array_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.json"):
        open_source(tmp_path / "x.json", "ilvr", tmp_path / "scratch")


def test_an_array_is_read_in_pieces(monkeypatch, good_record, tmp_path):
    """Records and numbers across the borders of windows, whatever the window."""
    from ilvr_ds.data.formats import plain_jsonl

    trees = [good_record(str(i), extra=[10**i, -1.5e300, True, None, '\\"]}\u20ac']) for i in range(20)]
    for chunk in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr(plain_jsonl, "CHUNK", chunk)
        for number, content in enumerate((array(trees), by_id(trees), json.dumps([12345, 6]).encode())):
            path = tmp_path / f"x{number}.json"
            path.write_bytes(content)
            made = plain_jsonl.plain_jsonl(path, True, "0" * 16, tmp_path / f"s{chunk}-{number}")
            lines = [json.loads(line) for line in made.read_text(encoding="utf-8").split("\n")[:-1]]
            assert lines == (trees if number < 2 else [12345, 6])


def test_array_entries_that_are_no_records_cost_only_themselves(good_record, tmp_path):
    (tmp_path / "x.json").write_bytes(json.dumps([good_record(), 3, [], {}]).encode())
    items = list(open_source(tmp_path / "x.json", "ilvr", tmp_path / "s").read(0, 4))
    assert isinstance(items[0], Record)
    assert [item.reason for item in items[1:]] == ["not_an_object", "not_an_object", "missing_field"]


def test_unknown_endings_and_missing_files(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    for name in ("x.csv", "none.jsonl", "x.gz"):
        with pytest.raises(ConfigError, match="--input"):
            open_source(tmp_path / name, "ilvr", tmp_path)


def test_a_damaged_row_group_costs_its_own_rows_only(trees, tmp_path):
    content = bytearray(parquet(trees))
    with pyarrow.parquet.ParquetFile(io.BytesIO(bytes(content))) as file:
        columns = [file.metadata.row_group(1).column(i) for i in range(file.metadata.num_columns)]
        low = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        high = max(c.data_page_offset + c.total_compressed_size for c in columns)
    content[low : min(high, low + 40)] = b"\xff" * min(40, high - low)
    (tmp_path / "x.parquet").write_bytes(bytes(content))
    source = open_source(tmp_path / "x.parquet", "ilvr", tmp_path)
    items = list(source.read(0, 5))
    assert [isinstance(item, Record) for item in items] == [True, True, False, False, True]
    assert {items[2].reason, items[3].reason} == {"unreadable_row"}
    assert [what(item) for item in source.read(3, 5)] == [what(item) for item in items[3:]]


def test_input_that_changed_is_refused(trees, tmp_path):
    for name in ("x.jsonl", "x.parquet"):
        path = tmp_path / name
        path.write_bytes(LAYOUTS[name](trees))
        source = open_source(path, "ilvr", tmp_path / "s")
        path.write_bytes(path.read_bytes() + b"{}\n")
        with pytest.raises(ConfigError, match="changed"):
            list(source.read(0, 1))


def test_missing_libraries_name_the_extra(trees, tmp_path, monkeypatch):
    for name, library in (("x.parquet", "pyarrow"), ("x.jsonl.zst", "zstandard")):
        (tmp_path / name).write_bytes(LAYOUTS[name](trees))
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.delitem(sys.modules, "ilvr_ds.data.formats.parquet", raising=False)
        with pytest.raises(ConfigError, match=r"ilvr_ds\[formats\]"):
            open_source(tmp_path / name, "ilvr", tmp_path / "scratch")


def test_damage_in_the_middle_of_a_row_group_keeps_the_rows_before(good_record, tmp_path):
    """Rows come in batches: what was already handed out is not handed out again as an error."""
    path = tmp_path / "x.parquet"
    table = pyarrow.table({name: [value] * 64 for name, value in good_record().items() if name != "id"})
    options = {"compression": "none", "use_dictionary": False, "data_page_size": 1, "write_batch_size": 4}
    pyarrow.parquet.write_table(table, path, **options)
    with pyarrow.parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    content[end - column.total_compressed_size // 4 : end] = b"\xff" * (column.total_compressed_size // 4)
    path.write_bytes(bytes(content))
    source = open_source(path, "ilvr", tmp_path)
    items = list(source.read(0, 64))
    good = [isinstance(item, Record) for item in items]
    assert len(items) == 64 and good[:16] == [True] * 16 and good[-1] is False
    assert {item.reason for item in items if isinstance(item, RecordError)} == {"unreadable_row"}
    assert [type(item) for item in source.read(10, 60)] == [type(item) for item in items[10:60]]
