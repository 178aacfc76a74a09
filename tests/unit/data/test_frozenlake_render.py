"""Pictures equal the environment's frames: checked on other people's frames, pixel for pixel."""

import importlib.util
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ilvr_ds.data import frozenlake_render
from ilvr_ds.data.frozenlake import parse_map, simulate
from ilvr_ds.data.frozenlake_render import BORDER, CELL, encode_png, render
from ilvr_ds.errors import PuzzleError

LAKE = parse_map([[0, -1, 0], [-1, 0, 2], [0, 1, 0]])


def differing_cells(one: np.ndarray, other: np.ndarray) -> set[tuple[int, int]]:
    rows, columns = np.nonzero((one != other).any(axis=-1))
    return {(int(r) // CELL, int(c) // CELL) for r, c in zip(rows, columns, strict=True)}


def test_test_set_frames_are_equal(realdata):
    folder = realdata / "vsp_planning_test"
    records = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for record in records[::10]:  # benchmarks/frozenlake_pixels.py does all 400
        with Image.open(folder / record["image_input"]) as image:
            real = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(render(parse_map(record["map_desc"])), real, err_msg=record["image_input"])


def test_frames_along_a_plan_are_equal(realdata):
    """An episode with every case: elf leaving, passing and standing on the start, facing all ways, on the goal."""
    moves = "RLLRUR"
    positions = simulate(LAKE, moves).positions
    for step, (position, move) in enumerate(zip(positions, [None, *moves], strict=True)):
        with Image.open(realdata / "mvot" / "images_mvot" / "frozenlake" / "1" / f"{step}.png") as image:
            real = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(render(LAKE, position, move), real, err_msg=f"step {step}")


def test_only_the_cells_the_elf_left_and_entered_change():
    before = render(LAKE)
    assert before.shape == (3 * CELL, 3 * CELL, 3)
    assert before.dtype == np.uint8
    for position in [(2, 2), (1, 1), (0, 0), (1, 2), (0, 1)]:  # safe cells, the goal, a hole
        assert differing_cells(before, render(LAKE, position, "R")) == {(2, 1), position}


def test_facing_changes_only_the_elf():
    views = [render(LAKE, (1, 1), move) for move in "LDRU"]
    for i, one in enumerate(views):
        for other in views[:i]:
            assert differing_cells(one, other) == {(1, 1)}
    np.testing.assert_array_equal(render(LAKE, (1, 1), None), views[1])


def test_rendering_does_not_write_into_the_cached_cells():
    first = render(LAKE, (2, 2), "R")
    render(LAKE, (1, 1), "U")[:] = 0
    np.testing.assert_array_equal(render(LAKE, (2, 2), "R"), first)


def test_cells_have_the_border_and_the_elf_stands_over_it():
    picture = render(LAKE)
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1], picture[CELL], picture[CELL - 1]):
        assert (edge == BORDER).all()


def test_equals_the_environment_itself():
    """gymnasium's own renderer, where pygame is installed."""
    pytest.importorskip("pygame", reason="pygame is not installed; the frames of the test set are checked instead")
    import gymnasium

    letters = {0: "F", 1: "S", 2: "G", -1: "H"}
    desc = ["".join(letters[cell] for cell in row) for row in LAKE]
    environment = gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=False, render_mode="rgb_array")
    environment.reset(seed=0)
    np.testing.assert_array_equal(render(LAKE), environment.render())
    environment.step(2)  # right
    np.testing.assert_array_equal(render(LAKE, (2, 2), "R"), environment.render())
    environment.close()


def test_png_is_lossless_and_deterministic():
    picture = render(LAKE, (1, 2), "R")
    assert encode_png(picture) == encode_png(picture.copy())
    with Image.open(io.BytesIO(encode_png(picture))) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), picture)


@pytest.mark.parametrize(("position", "move"), [((3, 0), None), ((0, -1), None), ((0, 0), "X")])
def test_impossible_elf(position, move):
    with pytest.raises(PuzzleError):
        render(LAKE, position, move)


def test_without_gymnasium_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PuzzleError, match=r"pip install 'ilvr_ds\[puzzles\]'"):
        frozenlake_render.sprite_folder()


@pytest.mark.parametrize("sprite", [None, (64, 64)])
def test_a_gymnasium_with_other_sprites_is_refused(tmp_path, sprite):
    """Version 1.4 renamed and redrew them. Run in a process of its own: sprites are cached."""
    package = tmp_path / "gymnasium"
    images = package / "envs" / "toy_text" / "img"
    images.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    if sprite is not None:
        Image.new("RGBA", sprite).save(images / "ice.png")
    code = "from ilvr_ds.data.frozenlake_render import render; render(((1, 2), (0, 0)))"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "PuzzleError" in result.stderr
    assert "ice.png" in result.stderr
    assert "pip install 'ilvr_ds[puzzles]'" in result.stderr


def test_another_cell_size_is_the_official_picture_averaged_cell_by_cell():
    official = Image.fromarray(render(LAKE, (1, 1), "U"))
    for cell in (32, 28, 16):
        small = render(LAKE, (1, 1), "U", cell)
        assert small.shape == (3 * cell, 3 * cell, 3)
        whole = np.asarray(official.resize((3 * cell, 3 * cell), Image.Resampling.BOX))
        assert np.abs(small.astype(int) - whole).max() <= 1
    with pytest.raises(PuzzleError, match="cell"):
        render(LAKE, cell=0)
