"""data_tools/make_frozenlake.py as a user runs it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_tools.make_frozenlake import main
from ilvr_ds.data.frozenlake import parse_map, simulate
from ilvr_ds.data.frozenlake_render import CELL, render


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_same_settings_same_bytes_and_more_only_adds(tmp_path, capsys):
    common = ["--sizes", "3", "5", "--seed", "4"]
    assert main(["--out", str(tmp_path / "a"), "--count", "6", *common]) == 0
    assert main(["--out", str(tmp_path / "b"), "--count", "6", *common]) == 0
    assert main(["--out", str(tmp_path / "c"), "--count", "9", *common]) == 0
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert c["records.jsonl"].startswith(a["records.jsonl"])
    assert all(c[name] == data for name, data in a.items() if name.startswith("images/"))
    capsys.readouterr()
    assert main(["--out", str(tmp_path / "a"), "--count", "6", *common]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["--out", str(tmp_path / "a"), "--count", "7", *common]) == 1
    assert "count: 6 there, 7 asked" in capsys.readouterr().err
    assert files(tmp_path / "a") == a


def test_pictures_decode_and_the_elf_is_where_the_plan_says(tmp_path):
    assert main(["--out", str(tmp_path / "p"), "--count", "8", "--moves-per-helper", "3"]) == 0
    records = read(tmp_path / "p")
    assert [record["id"] for record in records] == [f"frozenlake-0-{i:06d}" for i in range(8)]
    pointed_at = {"records.jsonl", "settings.json"}
    for record in records:
        map_desc = parse_map(record["map_desc"])
        moves = record["original_final_answer"].split(",")
        positions = simulate(map_desc, moves).positions
        before = render(map_desc)
        ends = [*range(3, len(moves), 3), len(moves)]
        helpers = [step["helper_image"] for step in record["sequence_plan"] if step["type"] == "latent"]
        for path, played in zip([*record["image_input"], *helpers], [0, *ends], strict=True):
            pointed_at.add(path)
            with Image.open(tmp_path / "p" / path) as image:
                picture = np.asarray(image)
            assert picture.shape == (CELL * len(map_desc),) * 2 + (3,)
            changed = (picture != before).any(axis=-1).reshape(len(map_desc), CELL, -1, CELL).any(axis=(1, 3))
            expected = {positions[0], positions[played]} if played else set()
            assert {(int(r), int(c)) for r, c in np.argwhere(changed)} == expected
    assert set(files(tmp_path / "p")) == pointed_at


def test_excluded_maps_stay_held_out(tmp_path):
    test_set, train = tmp_path / "test", tmp_path / "train"
    assert main(["--out", str(test_set), "--count", "30", "--sizes", "3"]) == 0
    arguments = ["--out", str(train), "--count", "30", "--sizes", "3", "--exclude", str(test_set / "records.jsonl")]
    assert main(arguments) == 0
    held_out = {json.dumps(record["map_desc"]) for record in read(test_set)}
    made = {json.dumps(record["map_desc"]) for record in read(train)}
    assert len(made) == 30
    assert not held_out & made


def test_puzzles_on_given_maps_small_and_brief(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "a"), "--count", "4", "--sizes", "3", "4"]) == 0
    again = ["--maps", str(tmp_path / "a" / "records.jsonl"), "--wording", "brief", "--cell", "28"]
    assert main(["--out", str(tmp_path / "b"), *again]) == 0
    assert [r["map_desc"] for r in read(tmp_path / "b")] == [r["map_desc"] for r in read(tmp_path / "a")]
    for record in read(tmp_path / "b"):
        with Image.open(tmp_path / "b" / record["image_input"][0]) as image:
            assert image.size == (28 * len(record["map_desc"]),) * 2
        assert record["text_input"].endswith("Find a shortest safe plan for the elf.")
    (tmp_path / "none.jsonl").write_text("\n")
    assert main(["--out", str(tmp_path / "c"), "--maps", str(tmp_path / "none.jsonl")]) == 1
    assert "no map" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "c"), "--count", "1", "--cell", "0"]) == 1
    assert "cell: got 0" in capsys.readouterr().err


def test_the_official_test_set_can_be_excluded(realdata, tmp_path):
    official = realdata / "vsp_planning_test" / "test.jsonl"
    assert main(["--out", str(tmp_path / "t"), "--count", "40", "--sizes", "3", "--exclude", str(official)]) == 0
    held_out = {json.dumps(json.loads(line)["map_desc"]) for line in official.read_text().splitlines()}
    assert not held_out & {json.dumps(record["map_desc"]) for record in read(tmp_path / "t")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count: got 0"),
        (["--count", "3", "--sizes", "1"], "sizes: 1"),
        (["--count", "3", "--hole-rate", "0.5", "0.2"], "hole_rate"),
        (["--count", "3", "--moves-per-helper", "0"], "moves_per_helper: got 0"),
        (["--count", "40", "--sizes", "2", "--hole-rate", "0.25", "0.25"], "no new solvable 2x2 map"),
        (["--count", "3", "--exclude", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_impossible_inputs_leave_nothing_behind(tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path / "x"), *arguments]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option(repository):
    result = subprocess.run(
        [sys.executable, str(repository / "data_tools" / "make_frozenlake.py"), "--help"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    for option in ("--out", "--count", "--sizes", "--hole-rate", "--seed", "--moves-per-helper", "--exclude"):
        assert option in result.stdout
