"""The command-line options of decoding, the same for every command that decodes. Imports no torch: --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ilvr_ds.inference.load import LoadedModel
    from ilvr_ds.inference.sequence import DecodeSettings


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """How many at once, how long, how drawn, on which images, on which device."""
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at once (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="latents counted (default: 512)")
    parser.add_argument("--max-spans", type=int, help="spans a sequence may open (default: no limit)")
    parser.add_argument("--early-end", action="store_true", help="the model may leave a span before its K latents")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this mass (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws, with each prompt's id (default: 0)")
    parser.add_argument("--latent-size", type=int, metavar="K", help="default: what the model's config.json says")
    parser.add_argument("--min-pixels", type=int, help="of an image; default: preprocessor_config.json")
    parser.add_argument("--max-pixels", type=int, help="of an image; as in the shards the model was trained on")
    parser.add_argument("--device", help="default: cuda (of this process) if there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    parser.add_argument("--attention", default="auto", choices=["auto", "flash_attn", "torch_varlen", "sdpa"])


def require_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End with a usage error if one of these options was given and is below 1."""
    for name in names:
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")


def load_asked(args: argparse.Namespace, folder: Path, device: str) -> tuple[LoadedModel, DecodeSettings, str]:
    """The model and the settings that these options ask for, and the name of the type it computes in.

    Raises what `load_model` raises, and ConfigError for impossible settings.
    """
    import torch  # not before the arguments are known to be right

    from ilvr_ds.inference.load import load_model
    from ilvr_ds.inference.sampling import Sampling
    from ilvr_ds.inference.sequence import DecodeSettings

    sampling = Sampling(args.temperature, args.top_p)  # wrong numbers are said before a large model is read
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    model = load_model(
        folder, dtype=getattr(torch, dtype), attention=args.attention, device=device,
        latent_size=args.latent_size, min_pixels=args.min_pixels, max_pixels=args.max_pixels,
    )  # fmt: skip
    settings = DecodeSettings(
        model.latent_size, args.max_new_tokens, args.max_spans, args.early_end, sampling=sampling, pause=model.pause
    )
    return model, settings, dtype
