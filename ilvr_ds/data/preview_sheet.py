"""Previews as one PNG contact sheet: a sample is a row, read from left to right like a storyboard.

Left the input images and the question, then each helper image with the text said before it, last the final text;
below a bar with the sequence to scale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ilvr_ds.data.preview import Preview, PreviewImage, one_line
from ilvr_ds.errors import IlvrError

FRAME = 232  # pixels: width of a frame, most that an image is high
COLUMNS = range(4, 8)  # fewest and most frames in a row
GAP, PAD, MARGIN = 18, 22, 40
LINE = 19  # pixels between lines of text
CAPTION_LINES, TILE_LINES = 6, 13
HEAD, RIBBON = 34, 10
PAPER, CARD, INK, SOFT, EDGE = "#f6f5f1", "#ffffff", "#20242c", "#737a86", "#e3e1da"
INPUT, HELPER, ANSWER, GIVEN = "#2f7fd3", "#7c4dff", "#2f8f52", "#d9dce1"


@dataclass(frozen=True)
class _Frame:
    """An image with lines below it, or a tile of text."""

    image: PreviewImage | None
    title: str
    colour: str
    text: str


class _Fonts:
    """DejaVu Sans, which has mathematics, arrows and most alphabets, from matplotlib's own folder."""

    def __init__(self) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise IlvrError("a contact sheet needs matplotlib (for its fonts): pip install 'ilvr_ds[report]'")
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.text = ImageFont.truetype(folder / "DejaVuSans.ttf", 13)
        self.bold = ImageFont.truetype(folder / "DejaVuSans-Bold.ttf", 13)
        self.title = ImageFont.truetype(folder / "DejaVuSans-Bold.ttf", 16)
        self.head = ImageFont.truetype(folder / "DejaVuSans-Bold.ttf", 24)


def contact_sheet(previews: Sequence[Preview], title: str, about: str) -> Image.Image:
    """Draw the sheet (RGB), as wide as its longest storyboard. Raises IlvrError if matplotlib is missing."""
    fonts = _Fonts()
    storyboards = [_frames(preview) for preview in previews]
    columns = min(max(COLUMNS.start, *map(len, storyboards)), COLUMNS.stop - 1)
    width = 2 * MARGIN + 2 * PAD + columns * (FRAME + GAP) - GAP
    rows = [_row(preview, frames, columns, fonts) for preview, frames in zip(previews, storyboards, strict=True)]
    head = MARGIN + 84
    sheet = Image.new("RGB", (width, head + sum(row.height + GAP for row in rows) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, fonts.head)
    draw.text((MARGIN, MARGIN + 30), about, SOFT, fonts.text)
    x = MARGIN
    for colour, name in ((INPUT, "input image"), (HELPER, "helper image, latents"), (ANSWER, "supervised text"),
                         (GIVEN, "given text")):  # fmt: skip
        draw.rounded_rectangle((x, MARGIN + 56, x + 13, MARGIN + 69), 3, colour)
        draw.text((x + 20, MARGIN + 54), name, SOFT, fonts.text)
        x += 20 + int(fonts.text.getlength(name)) + 26
    top = head
    for row in rows:
        sheet.paste(row, (MARGIN, top))
        top += row.height + GAP
    return sheet


def _row(preview: Preview, frames: list[_Frame], columns: int, fonts: _Fonts) -> Image.Image:
    bands = [frames[i : i + columns] for i in range(0, len(frames), columns)]
    heights = [_band_height(band, columns, fonts) for band in bands]
    width = 2 * PAD + columns * (FRAME + GAP) - GAP
    height = PAD + HEAD + sum(heights) + GAP * len(bands) + RIBBON + PAD
    row = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(row)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), 14, CARD, EDGE)
    facts = (
        f"number {preview.number}   {preview.shard}   {preview.length} tokens   "
        f"{preview.count(supervised=True)} supervised   {preview.count('image')} image   "
        f"{preview.count('latent')} latent"
    )
    room = width - 2 * PAD - fonts.text.getlength(facts) - GAP
    draw.text((PAD, PAD - 6), _cut(preview.id, room, fonts.title), INK, fonts.title)
    draw.text((width - PAD - fonts.text.getlength(facts), PAD - 4), facts, SOFT, fonts.text)
    top = PAD + HEAD
    for band, band_height in zip(bands, heights, strict=True):
        for column, frame in enumerate(band):
            left = PAD + column * (FRAME + GAP)
            _draw_frame(row, frame, left, top, _free_width(band, columns), fonts)
            if column:
                _arrow(draw, left - GAP // 2, top + _image_height(band) // 2)
        top += band_height + GAP
    _ribbon(draw, preview, PAD, top, width - 2 * PAD)
    return row


def _frames(preview: Preview) -> list[_Frame]:
    """Input images with the question, helper images with the text before them, then the text that is left."""
    question = one_line(" ".join(part for part in preview.prompt if isinstance(part, str)))
    inputs = [part for part in preview.prompt if isinstance(part, PreviewImage)]
    frames = [_Frame(image, f"{image.tokens} tokens", INPUT, "") for image in inputs]
    frames[:1] = [_Frame(inputs[0], frames[0].title, INPUT, question) if inputs else _Frame(None, "", INPUT, question)]
    said, span = "", 0
    for part in preview.steps:
        if isinstance(part, PreviewImage):
            span += 1
            title = f"span {span} · {preview.latent_size} for {part.tokens} candidates"
            frames.append(_Frame(part, title, HELPER, one_line(said)))
            said = ""
        else:
            said += f" {part}"
    if said.strip():
        frames.append(_Frame(None, "", ANSWER, one_line(said)))
    return frames


def _free_width(band: list[_Frame], columns: int) -> int:
    """Pixels from the last frame of a band to the right edge, that frame included."""
    free = columns - len(band) + 1
    return free * (FRAME + GAP) - GAP


def _wrap(text: str, room: int, most: int, fonts: _Fonts) -> list[str]:
    """At most `most` lines, `room` pixels wide; what is too much is left out in the middle: the end has the answer."""
    lines, line = [], ""
    for word in text.split(" "):
        word = _cut(word, room, fonts.text)
        if line and fonts.text.getlength(f"{line} {word}") > room:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    lines += [line] if line else []
    if len(lines) > most:
        lines = [*lines[: most // 2], "⋯", *lines[len(lines) - (most - most // 2 - 1) :]]
    return lines


def _tile(frame: _Frame, free: int, fonts: _Fonts) -> tuple[int, list[str]]:
    """Width and lines of a tile of text: the last one takes the `free` pixels, a question without image a frame."""
    width = free if frame.colour == ANSWER else FRAME
    return width, _wrap(frame.text, width - 28, TILE_LINES, fonts)


def _cut(text: str, room: float, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"


def _fitted(image: PreviewImage) -> tuple[int, int]:
    """Size on the sheet: within a frame; small drawings grow by whole factors at most."""
    width, height = image.picture.size
    scale = min(FRAME / width, FRAME / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _image_height(band: list[_Frame]) -> int:
    """Of the tallest image; of a band of text alone a line, which is where its arrows point."""
    return max((_fitted(frame.image)[1] for frame in band if frame.image), default=2 * LINE)


def _band_height(band: list[_Frame], columns: int, fonts: _Fonts) -> int:
    height = 0
    for frame in band:
        if frame.image is None:
            height = max(height, LINE * len(_tile(frame, _free_width(band, columns), fonts)[1]) + 26)
        else:
            captions = len(_wrap(frame.text, FRAME, CAPTION_LINES, fonts))
            height = max(height, _fitted(frame.image)[1] + 26 + LINE * captions)
    return height


def _draw_frame(row: Image.Image, frame: _Frame, left: int, top: int, free: int, fonts: _Fonts) -> None:
    draw = ImageDraw.Draw(row)
    if frame.image is None:
        width, lines = _tile(frame, free, fonts)
        box = (left, top, left + width - 1, top + LINE * len(lines) + 25)
        draw.rounded_rectangle(box, 8, "#f0f7f2" if frame.colour == ANSWER else "#eef3f9", frame.colour, 2)
        for number, line in enumerate(lines):
            draw.text((left + 14, top + 12 + LINE * number), line, INK, fonts.text)
        return
    size = _fitted(frame.image)
    picture = frame.image.picture
    grows = size[0] > picture.width
    picture = picture.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 8, 255)
    row.paste(picture, (left, top), mask)
    draw.rounded_rectangle((left, top, left + size[0] - 1, top + size[1] - 1), 8, outline=frame.colour, width=3)
    draw.text((left, top + size[1] + 6), frame.title, frame.colour, fonts.bold)
    for number, line in enumerate(_wrap(frame.text, FRAME, CAPTION_LINES, fonts)):
        draw.text((left, top + size[1] + 26 + LINE * number), line, INK, fonts.text)


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.polygon([(x - 4, y - 6), (x + 5, y), (x - 4, y + 6)], SOFT)


def _ribbon(draw: ImageDraw.ImageDraw, preview: Preview, left: int, top: int, width: int) -> None:
    colours = {"image": INPUT, "latent": HELPER}
    position = 0
    for run in preview.tokens:
        start, position = position, position + len(run.ids)
        colour = colours.get(run.kind, ANSWER if run.supervised else GIVEN)
        x0, x1 = (left + place * width / preview.length for place in (start, position))
        draw.rectangle((x0, top, max(x0, x1 - 0.01), top + RIBBON - 1), colour)
