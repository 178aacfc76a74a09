"""The bytes of an image a record points to: in the record itself, in a file, or in a tar.

a/b.png                     a file under the image root (or anywhere, if absolute)
a/b.*                       the one file `a/b` with an image's ending: data sets that name images without one
pictures.tar::a/b.png       a member of a tar; the tar is listed once per process, a member is one seek and read
"""

from __future__ import annotations

import functools
import tarfile
from pathlib import Path

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.images import ImageError, read_image_bytes

MEMBER = "::"
ANY_ENDING = ".*"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".PNG", ".JPG", ".JPEG")


def read_image_file(image: ImageRef, root: Path) -> bytes:
    """The undecoded bytes of an image; relative paths start at `root`.

    Raises ImageError missing_image, ambiguous_image, unreadable_image.
    """
    if image.content is not None:
        return image.content if isinstance(image.content, bytes) else image.content()
    archive, separator, member = image.path.partition(MEMBER)
    if separator:
        return _read_member(root / archive, member)
    path = root / image.path
    return read_image_bytes(_with_ending(path) if image.path.endswith(ANY_ENDING) else path)


def _with_ending(path: Path) -> Path:
    stem = str(path).removesuffix(ANY_ENDING)
    found = [name for ending in ENDINGS if (name := Path(stem + ending)).is_file()]
    if len(found) > 1:
        names = ", ".join(str(name) for name in found)
        raise ImageError("ambiguous_image", f"the record names the image without ending, and there are {names}")
    if not found:
        raise ImageError("missing_image", f"no such image: {stem} with one of {', '.join(ENDINGS)}")
    return found[0]


def _read_member(path: Path, member: str) -> bytes:
    try:
        facts = path.stat()
        places = _members(path, facts.st_size, facts.st_mtime_ns)
        if _plain(member) not in places:
            raise ImageError("missing_image", f"{path} has no file {member!r} among its {len(places)}")
        offset, size = places[_plain(member)]
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("missing_image", f"no such tar: {path}; check the image root") from None
    except (OSError, ValueError) as error:
        raise ImageError("unreadable_image", f"cannot read {str(path)!r}: {error}") from error
    if len(content) != size:
        raise ImageError("unreadable_image", f"{path} ends inside member {member!r}; fetch it again")
    return content


@functools.lru_cache(maxsize=16)
def _members(path: Path, size: int, changed_ns: int) -> dict[str, tuple[int, int]]:
    """Member name to (offset, size) of the regular files; of two with one name the later counts, as tar has it.

    `size` and `changed_ns` make a tar that was replaced a new one.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            return {_plain(info.name): (info.offset_data, info.size) for info in tar if info.isreg()}
    except tarfile.TarError as error:
        message = f"{path} is not a plain tar ({error}); compressed ones cannot be read at random: unpack it"
        raise ImageError("unreadable_image", message) from error


def _plain(name: str) -> str:
    return name.removeprefix("./")
