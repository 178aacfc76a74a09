"""What a JPEG file is made of, marker by marker (ITU-T T.81, annex B; JFIF: T.871): its scans, and its pixels alone.

`pixels_only` is strict: at anything that a camera or an image library would not write it gives up, and the image is
encoded anew from its pixels. Nothing is decoded here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"  # of the file
_SEQUENTIAL = (0xC0, 0xC1)  # SOF0, SOF1: baseline and extended, Huffman coded
_TABLES = (0xC4, 0xDB, 0xDD)  # DHT, DQT, DRI
_RESTART_INTERVAL, _SCAN, _APP0, _APP1, _APP14, _APP15, _COMMENT = 0xDD, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_COMPONENTS = 3
_WHOLE_BLOCKS = b"\x00\x3f\x00"  # a scan of all 64 coefficients in full precision
# The first marker behind entropy-coded data: there FF 00 is a byte, FF D0 to FF D7 are restarts.
_AFTER_SCAN = re.compile(rb"\xff[^\x00]")
_AFTER_SCAN_WITH_RESTARTS = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_AT_ONCE = 1 << 20  # bytes looked at together: a megabyte of memory, whatever the file's size


class PlainJpeg(NamedTuple):
    """A JPEG whose one scan holds all of its three components."""

    width: int
    height: int
    exif: bool  # the original has an APP1 segment: EXIF or XMP, which may ask for a turn
    content: bytes  # the file without metadata; decodes to the pixels of the original, bit by bit


def is_jpeg(content: bytes) -> bool:
    """Whether a file starts as a JPEG does."""
    return content.startswith(START)


def count_scans(content: bytes) -> int:
    """Scans of a JPEG, those of embedded previews included: how often FF DA occurs.

    A quarter of the time of `bytes.count`, whose search for two bytes is slow where the first of them is frequent.
    """
    values, scans = np.frombuffer(content, np.uint8), 0
    for start in range(0, len(values), _AT_ONCE):
        here = values[start : start + _AT_ONCE + 1]  # one byte more: a marker may lie across
        scans += np.count_nonzero((here[:-1] == 0xFF) & (here[1:] == _SCAN))
    return int(scans)


def pixels_only(content: bytes) -> PlainJpeg | None:
    """A JPEG file reduced to what its pixels need; None where that is not plain to see.

    Kept: SOI, JFIF's APP0 and Adobe's APP14 (they say what the components mean), DQT, SOF0 or SOF1, DHT, DRI, SOS, the
    scan, EOI. Dropped: every other APPn (EXIF, XMP, ICC, previews), comments, and what follows EOI.
    None: progressive, lossless or arithmetic coding, other than 8 bits or 3 components, several scans, a marker or a
    length that does not belong there, a scan that any other marker than EOI ends, no end.
    """
    if not is_jpeg(content):
        return None
    kept, frame, exif, restarts = [START], None, False, False
    position = len(START)
    while True:
        marker, payload, end = _segment(content, position)
        if marker == _SCAN:
            break
        if marker in _SEQUENTIAL and frame is None and _is_frame(payload):
            frame, keep = payload, True
        elif marker in _TABLES:
            keep = True
            if marker == _RESTART_INTERVAL:
                restarts = any(payload)  # an interval of 0 turns them off
        elif marker == _COMMENT or _APP0 <= marker <= _APP15:
            keep = _says_colours(marker, payload)
            exif |= marker == _APP1
            if keep is None:
                return None
        else:
            return None
        if keep:
            kept.append(content[position:end])
        position = end
    if frame is None or not _is_scan_of(frame, payload):
        return None
    stop = (_AFTER_SCAN_WITH_RESTARTS if restarts else _AFTER_SCAN).search(content, end)
    if stop is None or stop[0] != END:
        return None
    kept.append(content[position : stop.end()])
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    return PlainJpeg(width, height, exif, b"".join(kept))


def _segment(content: bytes, position: int) -> tuple[int, bytes, int]:
    """Marker, payload and end of the segment at `position`; marker 0 where there is none, or not all of it."""
    head = content[position : position + 4]
    length = int.from_bytes(head[2:], "big")
    end = position + 2 + length
    if len(head) < 4 or head[0] != 0xFF or length < 2 or end > len(content):
        return 0, b"", position
    return head[1], content[position + 4 : end], end


def _is_frame(payload: bytes) -> bool:
    """A frame header of 8 bits and three components that knows its height (0 would leave it to a later marker)."""
    eight_bits = len(payload) == 6 + 3 * _COMPONENTS and payload[0] == 8
    return eight_bits and payload[5] == _COMPONENTS and any(payload[1:3])


def _is_scan_of(frame: bytes, payload: bytes) -> bool:
    """A scan header that names the frame's components in their order."""
    names, named = frame[6::3], payload[1 : 1 + 2 * _COMPONENTS : 2]
    whole = len(payload) == 4 + 2 * _COMPONENTS and payload[0] == _COMPONENTS and payload.endswith(_WHOLE_BLOCKS)
    return whole and names == named and len(set(names)) == _COMPONENTS


def _says_colours(marker: int, payload: bytes) -> bool | None:
    """Whether a decoder reads the colour space off an APPn or comment; None: it means to say so, but is odd."""
    if marker == _APP0 and payload.startswith(b"JFIF"):
        return True if len(payload) == 14 and payload[4] == 0 else None  # a longer one has a preview
    if marker == _APP14 and payload.startswith(b"Adobe"):
        return True if len(payload) == 12 else None
    return False
