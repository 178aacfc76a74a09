"""The Qwen2.5-VL adapter: stock transformers modules, called piece by piece on packed sequences.

Everything that is particular to this architecture (names of submodules, keyword arguments, shapes of position
ids) is here; another backbone is another file with the same methods.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.errors import BatchError, ConfigError
from ilvr_ds.model.folder import ModelFolder, empty_network, read_tree
from ilvr_ds.model.latent_settings import check_latent_tokens
from ilvr_ds.model.loss_head import LossHead, replace_head
from ilvr_ds.model.patch_embedding import replace_patch_embedding
from ilvr_ds.model.varlen_attention import AttentionName, Bounds, PackedCache, resolve_attention, use_attention
from ilvr_ds.model.vision import DUMMY_GRID, FLOAT_PATCH, Grid, patches_of, vision_layout


class Backbone(nn.Module):
    """A Qwen2.5-VL model that runs packed sequences; its head is a `LossHead`.

    Parameters are reached only through calls of the modules that own them, so that a partitioned model
    (ZeRO-3) gathers them by its module hooks.
    """

    def __init__(
        self,
        network: Qwen2_5_VLForConditionalGeneration,
        *,
        attention: AttentionName = "auto",
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        train_vision: bool = False,
    ):
        """Take over a stock `network`: its head is replaced, its attention set, its vision tower frozen.

        Args:
            device: where the model will run; decides what attention "auto" is.
            train_vision: False freezes the vision tower and its merger.

        Raises:
            AttentionError: `attention` cannot run on `device` in the network's precision.
        """
        super().__init__()
        use_attention(network, resolve_attention(attention, device, network.dtype))
        replace_head(network)
        replace_patch_embedding(network.model.visual)
        network.model.visual.requires_grad_(train_vision)
        if gradient_checkpointing:
            _enable_checkpointing(network.model.language_model)
        self.network = network
        self.train_vision = train_vision
        self.unread: ModelFolder | None = None  # where the weights are, while the parameters have no memory

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype,
        attention: AttentionName = "auto",
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        train_vision: bool = False,
        vocabulary: Vocabulary | None = None,
        read_weights: bool = True,
    ) -> Backbone:
        """Read `folder` (config.json, weights) with stock `from_pretrained`, on the CPU.

        Args:
            read_weights: False leaves the parameters without memory (on the meta device) and sets `unread`; who
                partitions them (ZeRO-3) then reads each rank's piece of them.

        Raises:
            ConfigError: the folder holds no Qwen2.5-VL model, its embedding has fewer rows than
                `vocabulary` has ids, or its latent tokens are missing or have other ids.
            CheckpointError: a weight file is missing or damaged; see `ModelFolder`.
            AttentionError: `attention` cannot run on `device` in `dtype`.
        """
        folder = Path(folder)
        opened = ModelFolder(folder)  # says so if the folder is not a complete model's
        resolve_attention(attention, device, dtype)  # fail before the weights are read
        if read_weights:
            network = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
        else:
            network = empty_network(opened.config, dtype)
        backbone = cls(
            network,
            attention=attention,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
            train_vision=train_vision,
        )
        if vocabulary is not None:
            check_vocabulary(network, vocabulary, str(folder))
            check_latent_tokens(folder, vocabulary)
        backbone.unread = None if read_weights else opened
        return backbone

    @property
    def config(self) -> Qwen2_5_VLConfig:
        """The stock configuration."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        """Where the model runs: the device of a buffer, since parameters may be partitioned or offloaded."""
        return self.language_model.rotary_emb.inv_freq.device

    @property
    def language_model(self) -> nn.Module:
        """The text decoder with its embedding and final norm; what the teacher copies."""
        return self.network.model.language_model

    @property
    def head(self) -> LossHead:
        """The head over the vocabulary."""
        return self.network.lm_head

    def encode_images(self, pixels: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """Merged visual features of all images in one call of the vision tower.

        Args:
            pixels: (P, 588) uint8 or (P, 1176) floats as in `PackedBatch`, images one after the other.
            grids: (t, h, w) of each image; may be empty, then a dummy image is encoded so that the tower is
                called all the same, and no row of it is returned.

        Returns:
            (N, D) features, row-major per image; without gradient unless `train_vision`.

        Raises:
            BatchError: the number of rows does not fit the grids.
        """
        config = self.network.config.vision_config
        needed = sum(t * h * w for t, h, w in grids)
        if needed != pixels.shape[0]:
            raise BatchError(f"{pixels.shape[0]} rows of pixels, the {len(grids)} grids of the batch need {needed}")
        if not grids:
            pixels = torch.zeros(DUMMY_GRID[1] * DUMMY_GRID[2], FLOAT_PATCH, device=pixels.device)
        layout = vision_layout(grids or (DUMMY_GRID,), config.spatial_merge_size, config.window_size, config.patch_size)
        device = pixels.device
        with contextlib.nullcontext() if self.train_vision else torch.no_grad():
            output = self.network.model.visual(
                patches_of(pixels, grids),
                grid_thw=torch.tensor(grids or (DUMMY_GRID,)).to(device, non_blocking=True),
                **layout.kwargs(device),
            )
        features = output.pooler_output  # (N, D)
        # an empty slice keeps the dummy in the graph with gradient zero: the tower takes part in backward
        return features if grids else features[:0]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (T,) -> embeddings (T, D)."""
        return self.language_model.embed_tokens(input_ids)

    def decode(self, embeddings: Tensor, batch: PackedBatch) -> Tensor:
        """Input embeddings (T, D) of a packed batch -> last hidden states after the final norm (T, D)."""
        return run_language_model(self.language_model, embeddings, batch)


def read_config(folder: str | Path) -> Qwen2_5_VLConfig:
    """The configuration in a model folder, without its weights. Raises ConfigError if there is none."""
    read_tree(Path(folder))
    return Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)


def run_language_model(language_model: nn.Module, embeddings: Tensor, batch: PackedBatch) -> Tensor:
    """A Qwen2.5-VL text decoder over one packed sequence, no sample seeing another.

    Args:
        embeddings: (T, D).

    Returns:
        (T, D) hidden states after the final norm.
    """
    bounds = Bounds(batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
    return run_packed(language_model, embeddings, packed_position_ids(batch), bounds)


def packed_position_ids(batch: PackedBatch) -> Tensor:
    """(4, T): the position in the sample, then the three rotary rows."""
    tokens = torch.arange(batch.input_ids.shape[0], device=batch.cu_seqlens.device)
    in_sample = tokens - batch.cu_seqlens.to(torch.int64)[batch.sample_of_token]  # (T,)
    return torch.cat([in_sample[None], batch.position_ids])


def run_packed(
    language_model: nn.Module,
    embeddings: Tensor,
    position_ids: Tensor,
    bounds: Bounds,
    packed_cache: PackedCache | None = None,
) -> Tensor:
    """A Qwen2.5-VL text decoder over packed tokens, which may follow tokens of earlier calls.

    transformers' `use_cache` is off and no mask is passed: with 2-D or (3, 1, n) positions, one of its caches or
    a mask, it lets packed samples see each other; and it takes its caches away when activation checkpointing is
    on. Ours goes down to the attention function as one more keyword. The bounds go down as `cu_seq_lens_*` with
    Python integers as maximum, so that no layer asks the device.

    Args:
        embeddings: (n, D).
        position_ids: (4, n), as `packed_position_ids`.
        bounds: of the sequences among the n queries, and among the keys.
        packed_cache: gives each layer the keys of earlier calls; None: keys are those of the n tokens.

    Returns:
        (n, D) hidden states after the final norm.
    """
    output = language_model(
        inputs_embeds=embeddings[None],
        position_ids=position_ids[:, None],  # (4, 1, n)
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=bounds.q,
        cu_seq_lens_k=bounds.k,
        max_length_q=bounds.max_q,
        max_length_k=bounds.max_k,
        packed_cache=packed_cache,
    )
    return output.last_hidden_state[0]


def check_vocabulary(network: Qwen2_5_VLForConditionalGeneration, vocabulary: Vocabulary, origin: str) -> None:
    """Raise ConfigError unless every id of `vocabulary` has a row in the model's embedding and head."""
    rows = network.config.text_config.vocab_size
    if rows < vocabulary.size:
        raise ConfigError(
            f"{origin}: the model's embedding has {rows} rows (vocab_size), the tokenizer with its latent tokens needs "
            f"{vocabulary.size} ids; resize the embedding first, or use this model's own tokenizer"
        )


def _enable_checkpointing(language_model: nn.Module) -> None:
    """transformers' own non-reentrant activation checkpointing; its method was renamed in transformers 5.2x."""
    if hasattr(language_model, "activation_checkpointing_enable"):
        language_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
