"""The momentum teacher: a frozen copy of the student's language model that chooses the latents' targets."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ilvr_ds.config import TeacherConfig
from ilvr_ds.contracts import PackedBatch, TeacherTargets
from ilvr_ds.model.backbone import Backbone, run_language_model
from ilvr_ds.model.host_plan import HostPlan
from ilvr_ds.model.placement import place_image_features
from ilvr_ds.model.selection import global_queries, pad_candidates, pool_candidates, segment_mean, select_spans
from ilvr_ds.model.vision import merged_tokens


class Teacher(nn.Module):
    """Language model only (no vision tower, no head); never in training mode, never with a gradient.

    Its weights are moved by the engine (exponential moving average of the student's), never by an optimizer.
    """

    def __init__(self, language_model: nn.Module, merge: int, config: TeacherConfig):
        """Freeze `language_model` and own it; `merge` is the vision tower's `spatial_merge_size`."""
        super().__init__()
        self.language_model = language_model.requires_grad_(False)
        self.merge = merge
        self.config = config
        self.train(False)

    @classmethod
    def of(cls, student: Backbone, config: TeacherConfig) -> Teacher:
        """A teacher that starts as an exact copy of the student; call it before any partitioning."""
        merge = student.network.config.vision_config.spatial_merge_size
        return cls(copy.deepcopy(student.language_model), merge, config)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever the parent asks for (so activation checkpointing is off here too)."""
        return super().train(False)

    def targets(
        self, batch: PackedBatch, plan: HostPlan, input_features: Tensor, helper_features: Tensor
    ) -> TeacherTargets:
        """What `forward` returns, with names. (DeepSpeed finds tensors in a module's output only if it is a tuple.)"""
        return TeacherTargets(*self(batch, plan, input_features, helper_features))

    @torch.no_grad()
    def forward(
        self, batch: PackedBatch, plan: HostPlan, input_features: Tensor, helper_features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One forward over the packed sequence, then the selection (equations in `selection`).

        Latent pads keep the pad token's embedding: the teacher reads the question, the text and where the
        spans are, not what is in them. For the global query the last layer's W_q and W_k are applied to its
        last hidden states after the final norm (biases included, no rotary).

        Args:
            plan: of `batch`.
            input_features: (N, D) of the input images, in the order of `batch.image_positions`.
            helper_features: (M, D) of the S helper images.

        Returns:
            The fields of TeacherTargets in order; the same modules are called whatever the batch holds.
        """
        embeddings = self.language_model.embed_tokens(batch.input_ids)  # (T, D)
        placed = place_image_features(embeddings, batch.image_positions, input_features)
        hidden = run_language_model(self.language_model, placed, batch)  # (T, D)

        attention = self.language_model.layers[-1].self_attn
        queries = attention.q_proj(hidden[batch.prompt_positions]).unflatten(-1, (-1, attention.head_dim))
        keys = attention.k_proj(hidden[batch.image_positions]).unflatten(-1, (-1, attention.head_dim))
        global_query, global_defined = global_queries(
            hidden=hidden,
            queries=queries,
            keys=keys,
            prompt_positions=batch.prompt_positions,
            image_positions=batch.image_positions,
            prompt_embeddings=embeddings[batch.prompt_positions],
            image_features=input_features,
            prompt_counts=plan.prompt_counts,
            image_counts=plan.image_counts,
        )
        spans = len(plan.span_sample)
        local_query, local_defined = segment_mean(hidden[batch.local_positions], batch.local_span, spans)
        candidates, is_candidate = pad_candidates(self._candidates(batch, helper_features), like=helper_features)
        values, counts, bound = select_spans(
            candidates=candidates,
            is_candidate=is_candidate,
            global_query=global_query,
            global_defined=global_defined,
            local_query=local_query,
            local_defined=local_defined,
            span_sample=plan.span_sample,
            coverage=self.config.coverage,
            temperature=self.config.temperature,
            latent_size=batch.latent_size,
        )
        return global_query, values, counts, bound

    def _candidates(self, batch: PackedBatch, helper_features: Tensor) -> list[Tensor]:
        """Features of each helper image (P_s, D), pooled to at most `max_candidates`."""
        grids = batch.grids[batch.num_input_images :]
        images = helper_features.split([merged_tokens(grid, self.merge) for grid in grids]) if grids else ()
        return [
            pool_candidates(image, t * h // self.merge, w // self.merge, self.config.max_candidates)
            for image, (t, h, w) in zip(images, grids, strict=True)
        ]
