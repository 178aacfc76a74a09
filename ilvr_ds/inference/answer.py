"""A model folder as the `generate` of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ilvr_ds.errors import ConfigError
from ilvr_ds.inference.evaluate import Generate, Output
from ilvr_ds.inference.load import LoadedModel
from ilvr_ds.inference.requests import Request, encode_requests
from ilvr_ds.inference.sequence import DecodeSettings


def answer_with(model: LoadedModel, settings: DecodeSettings, batch_size: int, seed: int) -> Generate:
    """Answers with `model`, at most `batch_size` sequences at once; the outputs show each span as ⟦8 latents⟧.

    `seed`: of the run; each sequence draws by it and its own id. The details of an output: tokens, spans, latents,
    spans_skipped, unterminated.
    """

    def generate(requests: Sequence[Request]) -> list[Output]:
        prompts = list(encode_requests(requests, model.tokenizer, model.images, seed))
        generations = model.decoder.generate(prompts, settings, batch_size)
        return [
            Output(
                text=generation.display,
                prompt_sha256=prompt.sha256(),
                details={
                    "tokens": len(generation.tokens),
                    "spans": generation.spans_opened,
                    "latents": sum(generation.span_lengths),
                    "spans_skipped": generation.spans_skipped,
                    "unterminated": generation.unterminated,
                },
            )
            for prompt, generation in zip(prompts, generations, strict=True)
        ]

    return generate


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's files: two models never share an evaluation.

    Hidden files and subfolders are left out. Raises ConfigError if the folder cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise ConfigError(f"{folder}: cannot read the model folder: {error.strerror}") from error
    return digest.hexdigest()
