"""From a record to tar members: where images come from, how they are stored, and that equal ones are stored once."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.encode import encode_record
from ilvr_ds.data.image_codec import encode_image
from ilvr_ds.data.image_files import read_image_file
from ilvr_ds.data.images import ImageError, ImageSettings, encode_png, image_to_patches, read_image, resize_image
from ilvr_ds.data.sample_format import parse_sample
from ilvr_ds.errors import RecordError


def record(prompt=(), steps=("see",)) -> Record:
    return Record("r", (*prompt, "Q"), steps, "A", None, "/folder/file.jsonl:3")


def file_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def drawing(width: int = 308, height: int = 224) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for i in range(0, width, 28):
        draw.line((i, 0, i, height), "black")
    draw.ellipse((60, 60, 150, 150), outline="red", width=3)
    return image


def photograph(width: int = 308, height: int = 224, seed: int = 0) -> Image.Image:
    """Smooth shapes under a little sensor noise, as cameras give."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (height // 28, width // 28, 3), dtype=np.uint8))
    smooth = rough.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
    noisy = np.asarray(smooth) + rng.normal(0, 1, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture
def encode(tokenizer, tmp_path):
    def run(the_record, **settings):
        return encode_record(the_record, tmp_path, tokenizer, 4, ImageSettings(**settings))

    return run


def to_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"000.{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ PNG or JPEG
def test_drawings_are_png_and_photographs_jpeg():
    ending, content = encode_image(drawing(), ImageSettings())
    assert ending == "png" and (np.asarray(read_image(content)) == np.asarray(drawing())).all()
    ending, content = encode_image(photograph(), ImageSettings())
    assert ending == "jpg"
    difference = np.abs(np.asarray(read_image(content)).astype(int) - np.asarray(photograph()))
    assert difference.mean() <= 1.0
    assert len(content) * 1.5 < len(encode_png(photograph()))
    assert Image.open(io.BytesIO(content)).layer[0][1:3] == (1, 1)  # 4:4:4: colour keeps its resolution
    assert encode_image(photograph(), ImageSettings()) == (ending, content)


def test_every_condition_can_keep_the_png():
    assert encode_image(photograph(), ImageSettings())[0] == "jpg"
    assert encode_image(photograph(), ImageSettings(jpeg_quality=None))[0] == "png"
    assert encode_image(photograph(), ImageSettings(jpeg_saving=50.0))[0] == "png"
    assert encode_image(photograph(), ImageSettings(jpeg_max_error=0.1))[0] == "png"
    assert encode_image(photograph(), ImageSettings(jpeg_quality=60))[0] == "png"  # off by more than 1
    assert encode_image(photograph(), ImageSettings(jpeg_quality=60, jpeg_max_error=20.0))[0] == "jpg"


@pytest.mark.parametrize("size", [(28, 28), (28, 5600), (5600, 28), (56, 84), (1008, 756)])
def test_the_estimate_works_for_every_shape(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for image in (Image.new("RGB", size, "blue"), Image.fromarray(noise), photograph(*size)):
        ending, content = encode_image(image, ImageSettings())
        assert read_image(content).size == size
        if ending == "jpg":
            assert len(content) < len(encode_png(image))


def test_a_drawing_below_an_empty_half_is_still_seen():
    """The estimate looks at bands from top to bottom, not at the top."""
    image = Image.new("RGB", (308, 896), "white")
    image.paste(photograph(308, 448), (0, 448))
    assert encode_image(image, ImageSettings())[0] == "jpg"


def test_real_pictures_are_kept_to_the_pixel(realdata):
    """The records with reference pixels are drawings: never JPEG."""
    for path in [*sorted((realdata / "mirage").rglob("*.png"))[::7], *sorted((realdata / "mvot").rglob("*.png"))[::20]]:
        image = resize_image(read_image(path))
        ending, content = encode_image(image, ImageSettings())
        assert ending == "png" and read_image(content).tobytes() == image.tobytes()


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_a_photograph_on_one_side_is_seen(side):
    """Of a wide image pieces are looked at: they lie on all sides."""
    image, photo = Image.new("RGB", (1120, 840), "white"), photograph(1120, 840)
    box = {
        "left": (0, 0, 560, 840),
        "right": (560, 0, 1120, 840),
        "top": (0, 0, 1120, 420),
        "bottom": (0, 420, 1120, 840),
    }
    image.paste(photo.crop(box[side]), box[side])
    assert encode_image(image, ImageSettings())[0] == "jpg"
    assert encode_image(Image.new("RGB", (1120, 840), "white"), ImageSettings())[0] == "png"


# ---------------------------------------------------------------------------------------- storing
def test_equal_images_are_stored_once(encode, tmp_path):
    content = file_bytes(drawing())
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "again.bmp").write_bytes(file_bytes(drawing(), "BMP"))  # another file, the same pixels
    a, again, inside = ImageRef("a.png"), ImageRef("again.bmp"), ImageRef("x", content)
    other = ImageRef("y", file_bytes(drawing(56, 84)))
    sample = encode(record((a, "text", other, again), (a, "see", inside, other)))
    assert sorted(sample.members) == ["in0.png", "in1.png", "json"]
    tree = json.loads(sample.members["json"])
    assert [part["image"] for part in tree["prompt"] if isinstance(part, dict)] == ["in0.png", "in1.png", "in0.png"]
    assert [part["image"] for part in tree["steps"] if isinstance(part, dict)] == ["in0.png", "in0.png", "in1.png"]
    assert sample.counts["spans"] == 3
    assert sample.counts["image_tokens"] == 2 * 88 + 6  # every showing counts: 308x224 is 11x8 tokens, 56x84 2x3
    assert sample.counts["helper_tokens"] == 2 * 88 + 6
    raw = parse_sample(to_tar(sample.members))
    assert raw.input_members == ["in0.png", "in1.png", "in0.png"]
    assert raw.helper_members == ["in0.png", "in0.png", "in1.png"]


def test_one_picture_at_two_sizes_is_two_members(encode):
    image = ImageRef("x", file_bytes(drawing()))
    sample = encode(record((image,), (image, "see")), helper_max_pixels=28 * 28 * 16)
    assert sorted(sample.members) == ["help0.png", "in0.png", "json"]
    assert sample.counts["helper_tokens"] < sample.counts["image_tokens"]


def test_photographs_are_jpg_members_and_bytes_repeat(encode):
    image = ImageRef("x", file_bytes(photograph()))
    sample = encode(record((image,)))
    assert sorted(sample.members) == ["in0.jpg", "json"]
    assert encode(record((image,))).members == sample.members
    raw = parse_sample(to_tar(sample.members))
    patches, grid = image_to_patches(np.asarray(read_image(raw.images["in0.jpg"])))
    assert grid == raw.grids["in0.jpg"] and patches.shape == (22 * 16, 588)


def test_a_jpeg_of_the_right_size_is_stored_as_it_came(encode):
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    plain = file_bytes(photograph(), "JPEG", quality=80)
    original = file_bytes(photograph(), "JPEG", quality=80, exif=exif, icc_profile=b"profile", comment=b"comment")
    for content in (plain, original, original + b"preview"):
        sample = encode(record((ImageRef("x", content),)))
        assert sample.members["in0.jpg"] == plain
        assert json.loads(sample.members["json"])["grids"] == {"in0.jpg": [1, 16, 22]}


def test_a_jpeg_that_needs_a_change_is_encoded_anew(encode):
    small = file_bytes(photograph(300, 220), "JPEG", quality=80)
    assert small not in encode(record((ImageRef("x", small),))).members.values()  # resized
    right = file_bytes(photograph(), "JPEG", quality=80)
    assert sorted(encode(record((ImageRef("x", right),)), jpeg_quality=None).members) == ["in0.png", "json"]
    bounded = encode(record((ImageRef("x", right),), (ImageRef("x", right), "see")), helper_max_pixels=28 * 28 * 16)
    assert bounded.members["in0.jpg"] == right and bounded.members["help0.jpg"] != right  # each role has its bounds


def test_one_picture_in_several_files_is_one_member(encode):
    """By its pixels: as a JPEG stored as it came, with other tables, and as what it decodes to in another format."""
    original = file_bytes(photograph(), "JPEG", quality=80)
    files = [original, file_bytes(photograph(), "JPEG", quality=80, optimize=True), file_bytes(read_image(original)),
             file_bytes(read_image(original), "BMP")]  # fmt: skip
    assert len({encode(record((ImageRef("x", content),))).members["in0.jpg"] for content in files}) == 3
    for order in (files, files[::-1], [files[1], files[0], files[3], files[2]]):
        refs = [ImageRef(f"x{i}", content) for i, content in enumerate(order)]
        sample = encode(record(tuple(refs[:2]), (*refs[2:], "see")))
        assert sorted(sample.members) == ["in0.jpg", "json"]
        assert sample.members["in0.jpg"] == encode(record((refs[0],))).members["in0.jpg"]
        assert sample.counts["spans"] == 2 and sample.counts["image_tokens"] == 2 * 88


def test_pictures_that_look_alike_are_two(encode):
    """They differ in one pixel, between those that are looked at first."""
    one, other = drawing(), drawing()
    other.putpixel((101, 53), (1, 2, 3))
    sample = encode(record((ImageRef("x", file_bytes(one)), ImageRef("y", file_bytes(other)))))
    assert sorted(sample.members) == ["in0.png", "in1.png", "json"]
    assert read_image(sample.members["in1.png"]).tobytes() == other.tobytes()


def test_a_bad_image_names_record_and_image(encode):
    for image, reason in ((ImageRef("none.png"), "missing_image"), (ImageRef("column 3", b"no"), "undecodable_image")):
        with pytest.raises(RecordError) as error:
            encode(record(("look", image)))
        assert error.value.reason == reason and error.value.record_id == "r"
        assert error.value.field == f"input image {image.path}" and image.path in str(error.value)
        with pytest.raises(RecordError) as error:
            encode(record((), ("look", image)))
        assert error.value.field == f"helper image {image.path}"


# ------------------------------------------------------------------------------------------ files
@pytest.fixture
def archive(tmp_path):
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for name, content in (("./a/b.png", b"first"), ("c.png", b"second"), ("c.png", b"third")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return tmp_path


def why(path: str, root) -> str:
    with pytest.raises(ImageError) as error:
        read_image_file(ImageRef(path), root)
    return error.value.reason


def test_members_of_tars(archive):
    for name, content in (("a/b.png", b"first"), ("./a/b.png", b"first"), ("c.png", b"third")):
        assert read_image_file(ImageRef(f"pictures.tar::{name}"), archive) == content
        assert read_image_file(ImageRef(f"{archive}/pictures.tar::{name}"), archive / "elsewhere") == content
    assert why("pictures.tar::none.png", archive) == "missing_image"
    assert why("pictures.tar::link.png", archive) == "missing_image"  # links are not followed
    assert why("none.tar::c.png", archive) == "missing_image"
    (archive / "x.tar.gz").write_bytes(b"\x1f\x8b" + b"x" * 1000)
    assert why("x.tar.gz::c.png", archive) == "unreadable_image"


def test_a_replaced_tar_is_listed_again(archive):
    assert read_image_file(ImageRef("pictures.tar::c.png"), archive) == b"third"
    with tarfile.open(archive / "pictures.tar", "w") as tar:
        info = tarfile.TarInfo("new.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"new"))
    assert read_image_file(ImageRef("pictures.tar::new.png"), archive) == b"new"
    assert why("pictures.tar::c.png", archive) == "missing_image"


def test_names_without_ending(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"jpg")
    (tmp_path / "a.txt").write_bytes(b"txt")
    assert read_image_file(ImageRef("a.*"), tmp_path) == b"jpg"
    assert why("b.*", tmp_path) == "missing_image"
    (tmp_path / "a.png").write_bytes(b"png")
    assert why("a.*", tmp_path) == "ambiguous_image"


def test_what_is_no_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert why("pipe.png", tmp_path) == "unreadable_image"
    assert why("/dev/zero", tmp_path) == "unreadable_image"
    assert why("a\0b.*", tmp_path) in ("missing_image", "unreadable_image")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2 << 30)  # sparse
    assert why("huge.png", tmp_path) == "unreadable_image"
