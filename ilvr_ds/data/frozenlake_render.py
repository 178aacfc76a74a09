"""FrozenLake maps as pictures: gymnasium's sprites, drawn as its environment draws them.

The result equals the environment's `rgb_array` frames at 64 px a cell, pixel for pixel, and so the frames
of the VSP test set and of Mirage and MVoT, without pygame: `benchmarks/frozenlake_pixels.py` measures it.
Drawing order (gymnasium `frozen_lake.py`, `_render_gui`): per cell ice, then hole, goal or stool (the
start), then a 1-px border; last the elf, facing its last move, or cracked ice where it fell in.
"""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ilvr_ds.data.frozenlake import GOAL, HOLE, SAFE, START, MapDesc, Position, find_cell
from ilvr_ds.errors import PuzzleError

CELL = 64  # side of a cell in the official pictures, in pixels
SPRITE = 32  # side of a sprite file in pixels
BORDER = (180, 200, 230)  # the environment's own cell border
ELF = {"L": "elf_left", "D": "elf_down", "R": "elf_right", "U": "elf_up"}
OBJECT = {SAFE: None, HOLE: "hole", GOAL: "goal", START: "stool"}
INSTALL = "install the sprites with: pip install 'ilvr_ds[puzzles]'"


def render(
    map_desc: MapDesc, position: Position | None = None, last_move: str | None = None, cell: int = CELL
) -> np.ndarray:
    """The map with the elf at `position` (default: on the start) as (cell n, cell n, 3) uint8 RGB.

    The elf faces `last_move` (a letter of `frozenlake.MOVES`; default: down, as before the first move). The
    start keeps its stool when the elf has left; on the goal the elf stands before the gift. With `cell` other than
    64 each cell of the official picture is averaged down (or up) to `cell` pixels.
    Raises `PuzzleError` if gymnasium or one of its sprites is missing, the position is off the map, or `cell` < 1.
    """
    size = len(map_desc)
    here = find_cell(map_desc, START) if position is None else position
    if not (0 <= here[0] < size and 0 <= here[1] < size):
        raise PuzzleError(f"position {here} is off the {size}x{size} map")
    if last_move is not None and last_move not in ELF:
        raise PuzzleError(f"unknown move {last_move!r}; allowed: {', '.join(ELF)}")
    if cell < 1:
        raise PuzzleError(f"cell: got {cell} pixels; allowed: 1 or more")
    elf = ELF[last_move or "D"]
    rows = [
        [_tile(value, elf if (row, column) == here else None, cell) for column, value in enumerate(cells)]
        for row, cells in enumerate(map_desc)
    ]
    return np.concatenate([np.concatenate(tiles, axis=1) for tiles in rows], axis=0)


def encode_png(picture: np.ndarray) -> bytes:
    """An (H, W, 3) uint8 picture as PNG bytes; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def sprite_folder() -> Path:
    """Where the installed gymnasium keeps its sprites; `PuzzleError` if gymnasium is not installed."""
    spec = importlib.util.find_spec("gymnasium")  # finds the folder without running gymnasium's imports
    if spec is None or spec.origin is None:
        raise PuzzleError(
            f"drawing FrozenLake maps needs gymnasium's sprites, and gymnasium is not installed; {INSTALL}"
        )
    return Path(spec.origin).parent / "envs" / "toy_text" / "img"


@cache
def _sprite(name: str) -> np.ndarray:
    """One sprite scaled to a cell with nearest neighbour: (64, 64, 4) uint8 RGBA."""
    path = sprite_folder() / f"{name}.png"
    if not path.is_file():
        raise PuzzleError(f"{path}: this gymnasium has no such sprite (version 1.4 replaced them); {INSTALL}")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"))
    if pixels.shape != (SPRITE, SPRITE, 4):
        raise PuzzleError(f"{path}: expected a {SPRITE}x{SPRITE} sprite, got {image.size}; {INSTALL}")
    return pixels.repeat(CELL // SPRITE, axis=0).repeat(CELL // SPRITE, axis=1)


@cache
def _tile(value: int, elf: str | None, cell: int) -> np.ndarray:
    """A cell, with the elf (by its sprite) or without: (cell, cell, 3) uint8. Cached: never write into it."""
    tile = _sprite("ice")[..., :3].copy()
    name = OBJECT[value]
    if name is not None:
        tile = _blend(tile, _sprite(name))
    tile[[0, -1], :] = BORDER
    tile[:, [0, -1]] = BORDER
    if elf is not None:
        tile = _blend(tile, _sprite("cracked_hole" if value == HOLE else elf))
    return tile if cell == CELL else np.asarray(Image.fromarray(tile).resize((cell, cell), Image.Resampling.BOX))


def _blend(below: np.ndarray, sprite: np.ndarray) -> np.ndarray:
    """Paste (H, W, 4) over (H, W, 3), uint8, in pygame's integer arithmetic:

        out = below + (((colour - below) * alpha + colour) >> 8)

    (`ALPHA_BLEND` in pygame's surface.h; alpha 0 and 255 copy). True division differs by 1 in places.
    """
    colour, alpha = sprite[..., :3].astype(np.int32), sprite[..., 3:].astype(np.int32)
    under = below.astype(np.int32)
    mixed = under + (((colour - under) * alpha + colour) >> 8)
    return np.where(alpha == 0, under, np.where(alpha == 255, colour, mixed)).astype(np.uint8)
