"""The ways a record may hold an image.

"a/b.png"                                a path (a member of a tar: "pictures.tar::a/b.png")
"data:image/png;base64,iVBORw0..."       a data URL
"iVBORw0KGgo..."                         base64 alone, known by the first bytes of PNG, JPEG, GIF, WEBP, BMP or TIFF
b"\\x89PNG..."                            bytes (parquet)
{"bytes": ..., "path": ...}              bytes or base64 if there, else the path (as the `datasets` library writes)
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from ilvr_ds.contracts import ImageRef

_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+((?:;[\w=.+-]+)*),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST = 32  # characters; no image of any kind is shorter, while a path may be
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def image_field(value: Any, name: str) -> ImageRef:
    """`value` as an image; `name` is what messages call an image that has no path.

    Raises ValueError(reason, message): wrong_type, missing_image, bad_base64.
    """
    if isinstance(value, bytes):
        return ImageRef(name, value)
    if isinstance(value, dict):
        return _struct(value, name)
    if not isinstance(value, str):
        message = f"expected an image (a path, a data URL, base64, bytes, or an object with bytes), got {value!r:.80}"
        raise ValueError("wrong_type", message)
    if value[:5].lower() == "data:":
        url = _DATA_URL.match(value)
        if url is None or not url[1].lower().endswith(";base64"):
            raise ValueError("bad_base64", f"expected a data URL in base64, got {value[:60]!r}")
        return ImageRef(name, _decode(value[url.end() :]))
    content = _bare_base64(value)
    return ImageRef(value) if content is None else ImageRef(name, content)


def _struct(value: dict[str, Any], name: str) -> ImageRef:
    if "bytes" not in value and "path" not in value:
        raise ValueError("wrong_type", f"expected an object with bytes or path, it has {sorted(map(str, value))}")
    content, path = value.get("bytes"), value.get("path")
    if path is not None and (not isinstance(path, str) or not path):
        raise ValueError("wrong_type", f"path: expected a path, got {path!r:.80}")
    if content is None:
        if path is None:
            raise ValueError("missing_image", "the image has neither bytes nor a path")
        return ImageRef(path)
    if isinstance(content, str):
        content = _decode(content)
    elif not isinstance(content, bytes):
        raise ValueError("wrong_type", f"bytes: expected bytes or base64, got {content!r:.80}")
    return ImageRef(path or name, content)


def _bare_base64(text: str) -> bytes | None:
    """The image in a text that is nothing but base64 of an image; None for anything else, such as a path."""
    if len(text) < _SHORTEST or not _BASE64.fullmatch(text):
        return None
    try:
        content = _decode(text)
    except ValueError:
        return None
    return content if content.startswith(_MAGIC) else None


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: a character that is not ASCII
        raise ValueError("bad_base64", f"the image is not base64: {error}") from error
