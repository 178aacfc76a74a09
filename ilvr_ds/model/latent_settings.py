"""What a model's config.json says of its latents, under the key `ilvr`, which stock transformers keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ilvr_ds.data.tokens import LATENT_TOKENS, Vocabulary
from ilvr_ds.errors import ConfigError
from ilvr_ds.model.folder import read_tree

LATENT_KEY = "ilvr"  # of config.json


@dataclass(frozen=True)
class LatentSettings:
    """What config.json says of a model's latents."""

    latent_size: int  # K, latents in a span
    token_ids: dict[str, int]  # of the three latent tokens
    training: dict[str, Any] = field(default_factory=dict)  # summary of the run; empty before training

    @property
    def pause(self) -> bool:
        """The model was trained with empty pads (`latent.source: pause`): decoding feeds it the pad's embedding, not
        its own hidden states."""
        return self.training.get("latent", {}).get("source") == "pause"

    @classmethod
    def of(cls, latent_size: int, vocabulary: Vocabulary, training: dict[str, Any] | None = None) -> LatentSettings:
        """Settings with the latent ids of `vocabulary`."""
        ids = (vocabulary.latent_pad, vocabulary.latent_start, vocabulary.latent_end)
        return cls(latent_size, dict(zip(LATENT_TOKENS, ids, strict=True)), training or {})


def read_latent_settings(path: str | Path) -> LatentSettings:
    """What config.json says of the latents.

    Raises:
        ConfigError: it says nothing (a model without latent tokens), or a field is missing.
    """
    file, tree = Path(path) / "config.json", read_tree(Path(path))
    if LATENT_KEY not in tree:
        raise ConfigError(
            f"{file}: no key {LATENT_KEY!r}: this model has no latent tokens; add them with launch/prepare_model.py"
        )
    settings = tree[LATENT_KEY]
    try:
        training = dict(settings["training"])
        dict(training.get("latent", {}))  # a section, where the run has left its facts
        return LatentSettings(int(settings["latent_size"]), dict(settings["token_ids"]), training)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: key {LATENT_KEY!r} is damaged: {error!r}") from error


def check_latent_tokens(path: str | Path, vocabulary: Vocabulary) -> None:
    """The folder's own tokenizer and config must give the latent tokens the ids of `vocabulary`.

    A folder without tokenizer.json is not judged: nothing there can disagree.

    Raises:
        ConfigError: no latent tokens, or other ids.
    """
    path, wanted = Path(path), LatentSettings.of(1, vocabulary).token_ids
    file = path / "tokenizer.json"
    if file.is_file():
        tree = json.loads(file.read_text(encoding="utf-8"))
        known = {**tree["model"]["vocab"], **{entry["content"]: entry["id"] for entry in tree["added_tokens"]}}
        found = {token: known[token] for token in LATENT_TOKENS if token in known}
        if len(found) < len(LATENT_TOKENS):
            raise ConfigError(f"{file}: this model has no latent tokens; add them with launch/prepare_model.py")
        if found != wanted:
            raise ConfigError(f"{file}: latent tokens {found}, asked for with {wanted}: another vocabulary")
    if LATENT_KEY in read_tree(path):
        found = read_latent_settings(path).token_ids
        if found != wanted:
            file = path / "config.json"
            raise ConfigError(f"{file}: {LATENT_KEY}.token_ids is {found}, asked for with {wanted}: another vocabulary")
