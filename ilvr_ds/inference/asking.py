"""A task's questions asked in another way: in other words, or without their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ilvr_ds.contracts import ImageRef
from ilvr_ds.errors import ConfigError, RecordError
from ilvr_ds.inference.prompt import IMAGE_MARKER
from ilvr_ds.inference.tasks.task import Example


@dataclass(frozen=True)
class Asking:
    """How every prompt of a task is asked; part of what an evaluation's outputs depend on."""

    text: str | None = None  # in place of every prompt's text, one `<image>` for each image; None: as in the file
    images: bool = True  # False: image parts are taken out, the no-image baseline

    def apply(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with their prompts asked this way; everything else stays.

        Raises RecordError: marker_count (the text has another number of marks than a record has images; without
        images it may also have none), empty_prompt (nothing but images, which are taken out).
        """
        return [replace(example, prompt=self._prompt(example)) for example in examples]

    def settings(self) -> dict[str, Any]:
        """JSON values that identify it."""
        return {"prompt_text": self.text, "without_images": not self.images}

    def _prompt(self, example: Example) -> tuple[str | ImageRef, ...]:
        parts = example.prompt if self.text is None else self._in_other_words(example, self.text)
        if not self.images:
            parts = tuple(part for part in parts if isinstance(part, str))
            if not "".join(parts).strip():
                message = "the prompt is empty without its images; such a record has no no-image baseline"
                raise RecordError("empty_prompt", message, origin=example.origin, record_id=example.id, field="prompt")
        return parts

    def _in_other_words(self, example: Example, text: str) -> tuple[str | ImageRef, ...]:
        images = [part for part in example.prompt if isinstance(part, ImageRef)]
        texts = text.split(IMAGE_MARKER)
        marks = len(texts) - 1
        if marks == 0 and not self.images:
            return (text,)
        if marks != len(images):
            message = (
                f"the prompt file has {marks} {IMAGE_MARKER} mark(s), this record has {len(images)} image(s); write "
                "one mark for each image, where it goes"
            )
            raise RecordError("marker_count", message, origin=example.origin, record_id=example.id, field="prompt")
        parts: list[str | ImageRef] = [texts[0]]
        for image, following in zip(images, texts[1:], strict=True):
            parts += [image, following]
        return tuple(part for part in parts if part != "")


def read_prompt_file(file: Path) -> str:
    """The text of a prompt file, without the line break at its end. Raises ConfigError: unreadable, or no text."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; give a text file with the question") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error}") from error
    if not text.replace(IMAGE_MARKER, "").strip():
        raise ConfigError(f"{file}: holds no text; write the question, with {IMAGE_MARKER} where an image goes")
    return text.removesuffix("\n").removesuffix("\r")
