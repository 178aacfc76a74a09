"""Latent tokens for a pretrained model: rows in its embedding and head, entries in its tokenizer files.

Qwen2.5-VL's tables have more rows (152,064 in the 7B model, 151,936 in the 3B one) than its tokenizer has ids
(151,665), so the three tokens fit in: ids 151665 to 151667. The table is never made shorter; `rows` makes it longer.

A new row, in each table by itself (a tied model has one), is

    mean + NOISE * std * eps,   eps ~ N(0, 1),

with mean and std taken per column over the rows of the ids the tokenizer had. At the mean a new token's logit is
average whatever the state is, so the model's other probabilities hardly change, while what these rows held before was
never trained. The noise keeps the three apart: equal rows would get equal gradients wherever only their sum matters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilvr_ds.data.finished_folder import is_finished
from ilvr_ds.data.tokens import LATENT_TOKENS, ChatTokenizer
from ilvr_ds.errors import ConfigError
from ilvr_ds.model.folder import EMBEDDING, HEAD, ModelFolder
from ilvr_ds.model.folder_write import SHARD_BYTES, write_model
from ilvr_ds.model.latent_settings import LatentSettings
from ilvr_ds.model.safetensors_stream import CHUNK, TensorSource

NOISE = 0.1


def prepare_folder(
    source: Path, out: Path, *, latent_size: int, seed: int = 0, rows: int | None = None, shard_bytes: int = SHARD_BYTES
) -> bool:
    """Write `source` again with latent tokens, ready for training; True if written, False if it was there already.

    `source` is a published Qwen2.5-VL folder (its latent rows are made) or an ILVR checkpoint whose tokenizer has the
    latent tokens (its rows are kept as trained). Weights keep their dtype; memory is bounded by a chunk.

    Args:
        latent_size: K, written into config.json.
        rows: length of the tables afterwards; None: as they are.

    Raises:
        ConfigError: the tables lack rows for the tokenizer's ids, `rows` would shorten them, or `out` holds
            something else.
        CheckpointError: see `ModelFolder`.
    """
    if latent_size < 1:
        raise ConfigError(f"latent size {latent_size}: 1 or more")
    made_with = {
        "made_by": "prepare_model",
        "source": str(source.resolve()),
        "latent_size": latent_size,
        "seed": seed,
        "rows": rows,
    }
    if is_finished(out, made_with):
        return False
    folder, chat = ModelFolder(source), ChatTokenizer.from_folder(source)
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    settings = LatentSettings.of(latent_size, chat.vocabulary)
    texts, missing = tokenizer_texts(source, text, settings.token_ids)
    there, rows_out = _check_rows(folder, chat, rows, missing)
    new_rows = [*(settings.token_ids[token] for token in missing), *range(there, rows_out)]
    tables = {EMBEDDING, HEAD} & set(folder.shapes)
    sources = [
        _table_source(folder, name, rows_out, new_rows, seed) if name in tables else _source(folder, name)
        for name in folder.shapes
    ]
    write_model(
        out,
        sources,
        with_vocab_size(folder.tree, rows_out),
        settings,
        copy_from=source,
        texts=texts,
        made_with=made_with,
        shard_bytes=shard_bytes,
    )
    return True


def _check_rows(folder: ModelFolder, chat: ChatTokenizer, rows: int | None, missing: list[str]) -> tuple[int, int]:
    """(rows there, rows afterwards)."""
    there, needed = folder.shapes[EMBEDDING][0], chat.vocabulary.size
    rows_out = there if rows is None else rows
    if there < needed and not missing:
        raise ConfigError(
            f"{folder.path}: the tokenizer has {needed} ids, the embedding {there} rows: weights and tokenizer do not "
            "belong together"
        )
    if rows_out < needed:
        raise ConfigError(
            f"{folder.path}: {rows_out} rows do not hold the tokenizer's {needed} ids; ask for more with --rows"
        )
    if rows_out < there:
        raise ConfigError(f"--rows {rows_out}: the tables have {there} rows and are never made shorter")
    return there, rows_out


def _source(folder: ModelFolder, name: str) -> TensorSource:
    entry = folder.entry(name)
    return TensorSource(name, entry.dtype, entry.shape, lambda: folder.chunks(name, entry.dtype))


def _table_source(folder: ModelFolder, name: str, rows_out: int, new_rows: list[int], seed: int) -> TensorSource:
    entry = folder.entry(name)
    width = entry.shape[1]

    def chunks() -> Iterator[Tensor]:
        rows = make_rows(folder, name, new_rows, seed)
        step = max(1, CHUNK // width)
        for start in range(0, rows_out, step):
            block = torch.empty(min(step, rows_out - start), width, dtype=entry.dtype)
            have = max(0, min(block.shape[0], entry.shape[0] - start))
            folder.read(name, start * width, block[:have].view(-1))
            for row, values in rows.items():
                if start <= row < start + block.shape[0]:
                    block[row - start] = values
            yield block.view(-1)

    return TensorSource(name, entry.dtype, (rows_out, width), chunks)


def make_rows(folder: ModelFolder, name: str, new_rows: list[int], seed: int) -> dict[int, Tensor]:
    """{row: values (D,) float32} by the rule above, for one table; one pass over it, in float64.

    Every row has a generator of its own, seeded from (seed, table, row): it does not depend on the other rows.
    """
    if not new_rows:
        return {}
    trained, width = min(*new_rows, folder.shapes[name][0]), folder.shapes[name][1]
    total, squares = torch.zeros(2, width, dtype=torch.float64)
    step = max(1, CHUNK // width)
    for start in range(0, trained, step):
        block = torch.empty(min(step, trained - start), width, dtype=torch.float32)
        folder.read(name, start * width, block.view(-1))
        total += block.sum(0, dtype=torch.float64)
        squares += block.double().square().sum(0)
    mean = total / trained
    std = (squares / trained - mean.square()).clamp(min=0).sqrt()
    made = {}
    for row in new_rows:
        digest = hashlib.blake2b(f"{seed}:{name}:{row}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        made[row] = (mean + NOISE * std * torch.randn(width, generator=generator)).float()
    return made


def with_vocab_size(tree: dict[str, Any], rows: int) -> dict[str, Any]:
    """config.json for tables of `rows` rows, in the old layout (all at the top) or the new (in text_config)."""
    tree = dict(tree)
    if "vocab_size" in tree or "text_config" not in tree:
        tree["vocab_size"] = rows
    if "text_config" in tree:
        tree["text_config"] = {**tree["text_config"], "vocab_size": rows}
    return tree


def tokenizer_texts(source: Path, text: str, ids: dict[str, int]) -> tuple[dict[str, str], list[str]]:
    """The tokenizer files that change, {name: content}, and the latent tokens they lacked.

    The tokens are added as `ChatTokenizer` adds them in memory, so shards built with either have one fingerprint.
    """
    tree = json.loads(text)
    known = {*tree["model"]["vocab"], *(entry["content"] for entry in tree["added_tokens"])}
    missing = [token for token in LATENT_TOKENS if token not in known]
    if not missing:
        return {}, []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] += [{"id": ids[token], "content": token, **flags} for token in missing]
    trees = {"tokenizer.json": tree}
    config = _read_json(source / "tokenizer_config.json")
    if config is not None:
        entries = {str(ids[token]): {"content": token, **flags} for token in missing}
        config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), **entries}
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *missing]
        trees["tokenizer_config.json"] = config
    older = _read_json(source / "added_tokens.json")
    if older is not None:
        trees["added_tokens.json"] = {**older, **{token: ids[token] for token in missing}}
    texts = {name: json.dumps(tree, indent=2, ensure_ascii=False) + "\n" for name, tree in trees.items()}
    return texts, missing


def _read_json(file: Path) -> dict[str, Any] | None:
    """Content of an optional file. Raises ConfigError if it is there and not readable."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not a readable JSON file: {error}") from error
