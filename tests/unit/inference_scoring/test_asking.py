"""Prompts in other words and without images."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.contracts import ImageRef
from ilvr_ds.errors import ConfigError, RecordError
from ilvr_ds.inference.asking import Asking, read_prompt_file
from ilvr_ds.inference.tasks.task import Example

PARTS = st.lists(
    st.one_of(st.sampled_from(["a", " b\n", "c?"]), st.builds(ImageRef, st.sampled_from("xyz"))), max_size=6
)
TEXTS = st.lists(st.sampled_from(["", "one ", "two\n"]), min_size=1, max_size=5)


def example(parts) -> Example:
    return Example("a", tuple(parts), "", "f:1", answer="B")


@settings(deadline=None, max_examples=100)
@given(PARTS, TEXTS, st.booleans())
def test_text_is_the_files_and_images_are_the_records(parts, texts, images):
    pictures = [part for part in parts if isinstance(part, ImageRef)]
    asking = Asking("<image>".join(texts), images)
    fits = len(texts) - 1 == len(pictures) or (len(texts) == 1 and not images)
    if not fits or (not images and not "".join(texts).strip()):
        with pytest.raises(RecordError, match=r"f:1 \(id 'a'\): field 'prompt'"):
            asking.apply([example(parts)])
        return
    (asked,) = asking.apply([example(parts)])
    assert "".join(part for part in asked.prompt if isinstance(part, str)) == "".join(texts)
    assert [part for part in asked.prompt if isinstance(part, ImageRef)] == (pictures if images else [])
    assert "".join("<image>" if isinstance(part, ImageRef) else part for part in asked.prompt) == (
        "<image>".join(texts) if images else "".join(texts)
    )
    assert (asked.id, asked.origin, asked.answer) == ("a", "f:1", "B")


@settings(deadline=None, max_examples=50)
@given(PARTS)
def test_as_in_the_file(parts):
    assert Asking().apply([example(parts)]) == [example(parts)]


def test_nothing_left_to_ask():
    with pytest.raises(RecordError, match="the prompt is empty without its images"):
        Asking(images=False).apply([example(["q"]), example([ImageRef("x"), " "])])


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe?")
    with pytest.raises(ConfigError, match=r"p: not UTF-8"):
        read_prompt_file(tmp_path / "p")
    (tmp_path / "p").write_bytes(b" two\n\r\n")
    assert read_prompt_file(tmp_path / "p") == " two\n"
