"""JPEG files without their metadata: the same pixels to the bit, or nothing at all."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ilvr_ds.data import jpeg_file
from ilvr_ds.data.image_codec import encode_image
from ilvr_ds.data.images import ImageError, ImageSettings, read_image
from ilvr_ds.data.jpeg_file import count_scans, pixels_only

SECRET = b"taken at home"


def picture(width: int = 84, height: int = 56) -> Image.Image:
    rough = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = value, SECRET.decode()  # orientation, description
    return exif


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def after_start(content: bytes, *segments: bytes) -> bytes:
    return content[:2] + b"".join(segments) + content[2:]


def segments(content: bytes) -> list[int]:
    """The markers up to the first scan."""
    found, position = [], 2
    while not found or found[-1] != 0xDA:
        found.append(content[position + 1])
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return found


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB").tobytes()


# ----------------------------------------------------------------------------------------- scans
@settings(deadline=None)
@given(content=st.lists(st.sampled_from([b"\xff", b"\xda", b"\xff\xda", b"\0", b"abc"])).map(b"".join))
@pytest.mark.parametrize("at_once", [1, 2, 3, 1 << 20])
def test_scans_are_counted_wherever_they_lie(content, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg_file, "_AT_ONCE", at_once)
        assert count_scans(content) == content.count(b"\xff\xda")


# ------------------------------------------------------------------------------ what is passed on
PLAIN = {
    "4:2:0": {}, "4:2:2": {"subsampling": 1}, "4:4:4": {"subsampling": 0}, "best": {"quality": 100},
    "own Huffman tables": {"optimize": True}, "restarts": {"restart_marker_blocks": 2}, "RGB": {"keep_rgb": True},
}  # fmt: skip


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_a_file_without_metadata_stays_as_it_is(options):
    content = jpeg(**options)
    assert pixels_only(content) == (84, 56, False, content)
    assert pixels_only(content + SECRET).content == content  # what follows the end is dropped


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_metadata_is_dropped_and_pixels_stay(options):
    colour_profile = {"icc_profile": SECRET * 9000}  # two segments
    content = jpeg(exif=oriented(1), comment=SECRET, **colour_profile, **options)
    content = after_start(content, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + SECRET), segment(0xE0, b"JFXX\0"))
    content += SECRET + jpeg(Image.new("RGB", (84, 56)))
    plain = pixels_only(content)
    assert plain.exif and (plain.width, plain.height) == (84, 56)
    assert SECRET not in plain.content and len(plain.content) < len(content) - 9000 * len(SECRET)
    assert pixels(plain.content) == pixels(content)
    assert {*segments(plain.content)} <= {0xE0, 0xEE, 0xDB, 0xC0, 0xC4, 0xDD, 0xDA}
    assert plain.content == jpeg(**options)
    assert pixels_only(plain.content) == (84, 56, False, plain.content)


def test_what_says_the_colours_is_kept():
    """Adobe's segment alone tells RGB components from YCbCr: without it the picture would be another."""
    content = jpeg(keep_rgb=True)
    assert 0xEE in segments(content) and 0xE0 not in segments(content)
    assert pixels(pixels_only(content).content) == pixels(content)


def test_the_first_picture_of_several_is_taken(realdata):
    buffer = io.BytesIO()
    picture().save(buffer, format="MPO", save_all=True, append_images=[Image.new("RGB", (84, 56))])
    assert pixels_only(buffer.getvalue()).content == jpeg()
    content = (realdata / "hard_images/pillow/sugarshack.mpo").read_bytes()
    plain = pixels_only(content)
    assert plain.exif and pixels(plain.content) == pixels(content)
    with Image.open(io.BytesIO(plain.content)) as image:
        assert image.format == "JPEG" and not image.getexif() and image.info.keys() <= {"jfif", "jfif_version", "dpi",
               "jfif_unit", "jfif_density", "adobe", "adobe_transform"}  # fmt: skip


def test_real_files(realdata):
    """Everything that is a JPEG among other people's files: passed on with its pixels, or not at all."""
    passed = set()
    for path in sorted(realdata.rglob("*.jpg")):
        plain = pixels_only(content := path.read_bytes())
        if plain is not None:
            assert pixels(plain.content) == pixels(content), path
            passed.add(path.name)
    assert len(passed) == 39  # 35 mazes and 4 of the hard files
    assert {"hopper_16bit_qtables.jpg", "hopper_orientation_5.jpg"} <= passed
    assert passed.isdisjoint({"hopper_bad_exif.jpg", "icc-after-SOF.jpg"})  # grey
    assert "junk_jpeg_header.jpg" not in passed


# ---------------------------------------------------------------------------------- what is not
def without(content: bytes, marker: int) -> bytes:
    """The file less its first segment of a kind."""
    at = content.index(bytes([0xFF, marker]))
    return content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]


def replaced(content: bytes, marker: int, at: int, value: int) -> bytes:
    """The file with byte `at` behind a marker's length replaced."""
    place = content.index(bytes([0xFF, marker])) + 4 + at
    return content[:place] + bytes([value]) + content[place + 1 :]


SECOND_FRAME = segment(0xC0, b"\x08\0\x38\0\x54\3\1\x22\0\2\x11\1\3\x11\1")
ODD = {
    "progressive": lambda: jpeg(progressive=True),
    "grey": lambda: jpeg(picture().convert("L")),
    "CMYK": lambda: jpeg(picture().convert("CMYK")),
    "no JPEG": lambda: b"\x89PNG" + jpeg(),
    "empty": lambda: b"",
    "no more than a start": lambda: b"\xff\xd8",
    "cut in the header": lambda: jpeg()[:100],
    "cut in the scan": lambda: jpeg()[:-100],
    "no end": lambda: jpeg()[:-2],
    "half an end": lambda: jpeg()[:-1],
    "12 bits": lambda: replaced(jpeg(), 0xC0, 0, 12),
    "height said later": lambda: replaced(replaced(jpeg(), 0xC0, 1, 0), 0xC0, 2, 0),
    "arithmetic coding": lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc9"),
    "lossless": lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc3"),
    "no frame": lambda: without(jpeg(), 0xC0),
    "two frames": lambda: jpeg().replace(b"\xff\xc4", SECOND_FRAME + b"\xff\xc4", 1),
    "a scan of one component": lambda: jpeg().replace(b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11", b"\xff\xda\0\x08\1\1\0"),
    "a scan in another order": lambda: jpeg().replace(b"\3\1\0\2\x11\3\x11", b"\3\2\x11\1\0\3\x11"),
    "a scan of some coefficients": lambda: jpeg().replace(b"\3\x11\0\x3f\0", b"\3\x11\0\x05\0"),
    "a second scan": lambda: jpeg()[:-2] + b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0" + jpeg()[-40:],
    "restarts without an interval": lambda: without(jpeg(restart_marker_blocks=2), 0xDD),
    "a table within the scan": lambda: jpeg()[:-2] + segment(0xFE, b"x") + jpeg()[-2:],
    "padding before the end": lambda: jpeg()[:-2] + b"\xff" + jpeg()[-2:],
    "padding before a segment": lambda: after_start(jpeg(), b"\xff"),
    "junk before a segment": lambda: after_start(jpeg(), b"junk"),
    "a marker without length": lambda: after_start(jpeg(), b"\xff\x01"),
    "a length of one": lambda: after_start(jpeg(), b"\xff\xfe\0\1"),
    "an unknown segment": lambda: after_start(jpeg(), segment(0xF0, b"x")),
    "a preview in JFIF": lambda: after_start(jpeg(), segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\1\1abc")),
    "half of Adobe's segment": lambda: after_start(jpeg(), segment(0xEE, b"Adobe\0")),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_anything_odd_is_left_to_the_encoder(odd):
    assert odd() != jpeg()  # the change took place
    assert pixels_only(odd()) is None


# ------------------------------------------------------------------------------------ in storage
def test_turned_pictures_are_encoded_anew():
    square = picture(84, 84)  # turned, it still has the size of the file
    for value in range(0, 10):
        content = jpeg(square, exif=oriented(value))
        ending, stored = encode_image(read_image(content), ImageSettings(jpeg_saving=1e9), content)
        assert (ending == "jpg") == (value not in range(2, 9)), value
        assert read_image(stored).tobytes() == read_image(content).tobytes()
    # XMP can ask for a turn too
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = after_start(jpeg(square), segment(0xE1, xmp))
    assert read_image(content).tobytes() != square.tobytes() and pixels_only(content).content == jpeg(square)
    assert encode_image(read_image(content), ImageSettings(jpeg_saving=1e9), content)[0] == "png"


SEEDS = [
    *(jpeg(**options) for options in PLAIN.values()),
    jpeg(exif=oriented(1)), jpeg(exif=oriented(6)), jpeg(icc_profile=SECRET, comment=SECRET), jpeg(progressive=True),
    jpeg(picture().convert("L")), jpeg(picture().convert("CMYK")),
]  # fmt: skip
BYTES = st.one_of(st.sampled_from([0, 1, 0xFF, 0xD9, 0xDA, 0xD0, 0xD8, 0xE1, 0xC4, 0xDD, 0xC2]), st.integers(0, 255))
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, 1200), BYTES), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=600)
@given(seed=st.sampled_from(SEEDS), changes=CHANGES, tail=st.sampled_from([b"", b"\xff\xd9", SECRET, SEEDS[0]]))
def test_damaged_files_keep_their_pixels_or_are_not_passed_on(seed, changes, tail):
    content = bytearray(seed)
    for kind, place, value in changes:
        place = min(place, len(content) - 1)
        match kind:
            case "set":
                content[place] = value
            case "insert":
                content.insert(place, value)
            case "delete" if len(content) > 40:
                del content[place : place + 1 + value % 20]
            case "cut" if value % 8 == 0 and place > 2:
                del content[place:]
    content = bytes(content) + tail
    try:
        image = read_image(content)
    except ImageError:
        return
    ending, stored = encode_image(image, ImageSettings(jpeg_saving=1e9), content)  # JPEG only if it is passed on
    assert read_image(stored).tobytes() == image.tobytes()
    assert ending == "png" or SECRET not in stored
