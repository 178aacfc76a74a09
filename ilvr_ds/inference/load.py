"""A model folder, checked and made ready to generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ilvr_ds.data.images import ImageSettings
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError
from ilvr_ds.inference.decode import Decoder
from ilvr_ds.model.backbone import Backbone, read_config
from ilvr_ds.model.folder import read_tree
from ilvr_ds.model.latent_settings import LATENT_KEY, check_latent_tokens, read_latent_settings
from ilvr_ds.model.pixel_bounds import PREPROCESSOR_FILE, check_pixel_bounds, read_pixel_bounds
from ilvr_ds.model.varlen_attention import AttentionName


@dataclass(frozen=True)
class LoadedModel:
    """What generation needs of a model folder."""

    decoder: Decoder
    tokenizer: ChatTokenizer
    latent_size: int  # K
    images: ImageSettings  # of input images
    pause: bool = False  # trained with empty pads: see `DecodeSettings.pause`


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionName = "auto",
    device: torch.device | str = "cpu",
    latent_size: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> LoadedModel:
    """Read weights, tokenizer and settings of a folder that was trained with latents.

    Args:
        latent_size: K; None takes what config.json says.
        min_pixels, max_pixels: bounds of input images; None takes preprocessor_config.json's.

    Raises:
        ConfigError: not a Qwen2.5-VL folder, no latent tokens, a tokenizer and a config that give one token two
            ids, fewer embedding rows than ids, impossible pixel bounds.
        CheckpointError: a weight file is missing, cut short or damaged.
        AttentionError: `attention` cannot run on `device` in `dtype`.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = ChatTokenizer.from_folder(folder)
    check_latent_tokens(folder, tokenizer.vocabulary)
    if config.image_token_id != tokenizer.vocabulary.image_pad:
        raise ConfigError(
            f"{folder / 'config.json'}: image_token_id is {config.image_token_id}, in tokenizer.json <|image_pad|> is "
            f"{tokenizer.vocabulary.image_pad}: model and tokenizer belong to different vocabularies; use the "
            "tokenizer the model was trained with"
        )
    pause = LATENT_KEY in read_tree(folder) and read_latent_settings(folder).pause
    if latent_size is None:
        try:
            latent_size = read_latent_settings(folder).latent_size
        except ConfigError as error:
            raise ConfigError(f"{error}; or say how many latents a span has (--latent-size)") from error
    images = image_settings_of(folder, min_pixels, max_pixels)
    backbone = Backbone.load(
        folder, dtype=dtype, attention=attention, device=device, vocabulary=tokenizer.vocabulary
    ).to(device)
    return LoadedModel(Decoder(backbone, tokenizer), tokenizer, latent_size, images, pause)


def image_settings_of(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageSettings:
    """Pixel bounds as given, else those of preprocessor_config.json, else Qwen's.

    Raises ConfigError for a file that cannot be read or bounds that no image can meet.
    """
    low, high = read_pixel_bounds(folder)
    low, high = (low if min_pixels is None else min_pixels), (high if max_pixels is None else max_pixels)
    check_pixel_bounds(low, high, str(folder / PREPROCESSOR_FILE))
    return ImageSettings(input_min_pixels=low, input_max_pixels=high)
