"""Prompts to answer, from a JSONL file or from a command line; nothing encoded, no image decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats.ilvr_jsonl import parse_prompt
from ilvr_ds.data.formats.jsonl import parse_object, read_lines
from ilvr_ds.data.images import ImageSettings
from ilvr_ds.data.tokens import ChatTokenizer, Part
from ilvr_ds.errors import ConfigError, RecordError
from ilvr_ds.inference.prompt import EncodedPrompt, build_prompt, parts_of_text, sequence_seed


@dataclass(frozen=True)
class Request:
    """One user turn to answer."""

    id: str
    parts: tuple[Part, ...]  # in reading order; image paths are relative to `image_root`
    image_root: Path
    origin: str  # for messages


def read_requests(file: Path, image_root: Path | None = None) -> list[Request]:
    """The prompts of a JSONL file in ILVR's format; `id`, `text_input` and `image_input` are read, no other field.

    Args:
        image_root: folder that relative image paths start from; None: the file's.

    Raises:
        RecordError: a line that is no record, marks and images that differ in number, an image that is not there.
        ConfigError: no such file, or no line in it.
    """
    root = file.parent if image_root is None else image_root
    try:
        fields = [parse_object(line) for line in read_lines(file)]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; give a JSONL file of records") from error
    if not fields:
        raise ConfigError(f"{file}: holds no record; give a JSONL file with one record a line")
    requests = [Request(f.record_id, parse_prompt(f), root, f.origin) for f in fields]
    for request in requests:
        _check_images(request)
    return requests


def typed_request(text: str, images: Sequence[str]) -> Request:
    """One prompt from a command line. Raises ConfigError (marks and images differ), RecordError (missing image)."""
    request = Request("prompt", parts_of_text(text, images), Path(), "--prompt")
    _check_images(request)
    return request


def encode_requests(
    requests: Iterable[Request], tokenizer: ChatTokenizer, images: ImageSettings, seed: int
) -> Iterator[EncodedPrompt]:
    """Each request encoded when it is asked for, with its own seed. Raises what `build_prompt` raises."""
    for request in requests:
        yield build_prompt(
            request.parts,
            tokenizer,
            images,
            request.image_root,
            prompt_id=request.id,
            origin=request.origin,
            seed=sequence_seed(seed, request.id),
        )


def _check_images(request: Request) -> None:
    """Before a model is loaded: a long run should not end at its last record."""
    for part in request.parts:
        if isinstance(part, ImageRef) and not (request.image_root / part.path).is_file():
            raise RecordError(
                "missing_image",
                f"no such image: {request.image_root / part.path}; check the path and the image root",
                origin=request.origin,
                record_id=request.id,
                field=f"image {part.path}",
            )
