"""Stage 2 over ranks: unequal chains neither hang nor change a gradient; agreement; restart."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.config import LatentConfig, LossConfig, parse_recipe
from ilvr_ds.contracts import IGNORE_INDEX, Sample
from ilvr_ds.data.packing import filler_batch, pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.engine.agree import largest_over_ranks
from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from ilvr_ds.engine.optimizer_state import OptimizerState
from ilvr_ds.engine.step import train_step
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.objective.relaxed import RelaxedObjective

V = Vocabulary(
    im_start=50, im_end=51, vision_start=52, vision_end=53, image_pad=54, video_pad=55, latent_pad=56,
    latent_start=57, latent_end=58, assistant=59, size=61, fingerprint="test",
)  # fmt: skip
K = 3
# spans and images of the samples of each micro-batch of a step; over two ranks the first is rank 0's
CUTS = {
    "one rank has no span": [[(2, 1), (0, 1), (1, 0)], [(0, 0), (0, 1)]],
    "no rank has a span": [[(0, 1)], [(0, 0)]],
    "two micro-batches, unequal chains": [[(1, 1)], [(3, 1), (1, 0)], [(2, 0)], [(0, 1)]],
    "one rank has a filler": [[(2, 1), (1, 1)], None],
}


def network() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 0,
            "eos_token_id": V.im_end, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
            "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
                       "window_size": 56, "fullatt_block_indexes": [1]},
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return model


def sample(number: int, spans: int, images: int) -> Sample:
    rng = np.random.default_rng(number)
    words = lambda n: rng.integers(0, 49, n).tolist()  # noqa: E731
    ids = [V.im_start, *words(2), *([V.vision_start, V.image_pad, V.vision_end] * images), *words(4), V.im_end]
    ids += [V.im_start, V.assistant]
    start = len(ids)
    for _ in range(spans):
        ids += [*words(3), V.latent_start, *[V.latent_pad] * K, V.latent_end]
    ids = np.array([*ids, *words(3 + number % 3), V.im_end])
    labels = np.where((np.arange(len(ids)) >= start) & (ids != V.latent_pad), ids, IGNORE_INDEX)
    grids = ((1, 2, 2),) * (images + spans)
    pixels = rng.integers(0, 256, (4 * len(grids), 588), dtype=np.uint8)
    return Sample(number, f"s{number}", ids, labels, grids, images, pixels[: 4 * images], pixels[4 * images :])


def step_batches(cut: str, parts: int):
    """The samples of a step in the micro-batches of the cut, or all in one; weights are the step's in both."""
    numbers = iter(range(100))
    groups = [None if g is None else [sample(next(numbers), *shape) for shape in g] for g in CUTS[cut]]
    samples = [s for g in groups if g for s in g]
    totals = StepTotals(samples=len(samples), supervised=1, spans=1, tokens=1)
    if parts == 1:
        groups = [samples]
    return [filler_batch(V, K) if g is None else pack(g, V, K, totals=totals) for g in groups]


def recipe(checkpointing: bool):
    return parse_recipe(
        {
            "name": "t", "run": {"dir": "r"}, "data": {"shards": "s"},
            "model": {"path": "m", "dtype": "float32", "gradient_checkpointing": checkpointing},
            "latent": {"size": K, "source": "self"}, "teacher": None, "loss": {"sim_weight": 0},
            "optimizer": {"lr": 1e-3, "grad_clip": 0},
        },
        "test",
    )  # fmt: skip


def engine_of(stage: int, checkpointing: bool, **zero):
    student = Backbone(network(), attention="sdpa", gradient_checkpointing=checkpointing)
    agree = largest_over_ranks(torch.device("cpu"))
    objective = RelaxedObjective(student, LatentConfig(size=K, source="self"), LossConfig(sim_weight=0), agree)
    return build_engine(objective, recipe(checkpointing), {"zero_optimization": {"stage": stage, **zero}})


def first_moments(engine) -> list:
    state = OptimizerState(engine)
    return [
        (name, piece.start, tensor.clone())
        for kind, tensors in state.tensors().items()
        if kind == "exp_avg"
        for (name, piece), tensor in zip(state.pieces, tensors, strict=True)
        if piece.numel
    ]


def one_step(parts: int, cases: list) -> dict:
    """First Adam moments (0.1 times the gradient) after one step, per (cut, stage, checkpointing)."""
    results = {}
    for cut, stage, checkpointing in cases:
        # nothing persists and nothing is reused: every module call gathers
        zero = dict(stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0) if stage == 3 else {}
        engine = engine_of(stage, checkpointing, **zero)
        batches = step_batches(cut, parts)
        each = len(batches) // engine.world
        mine = batches[engine.rank * each :][:each]
        outcomes = [train_step(engine, mine, lr=1e-3, noise_seed=0)]
        moments = first_moments(engine)
        outcomes += [train_step(engine, mine, lr=1e-3, noise_seed=0) for _ in range(2)]  # traces recorded, then used
        results[cut, stage, checkpointing] = ([dataclasses.asdict(o) for o in outcomes], moments)
        engine.deepspeed.destroy()
    return results


CASES = [(cut, stage, ck) for cut in CUTS for stage in (0, 3) for ck in (False, True) if stage == 3 or not ck]


@pytest.fixture(scope="module")
def runs():
    return {
        "one": run_ranks(one_step, 1, 1, [(cut, 0, False) for cut in CUTS], timeout_s=100),
        "two": run_ranks(one_step, 2, 2, CASES, timeout_s=200),
    }


def assembled(per_rank) -> dict:
    full: dict = {}
    for name, start, values in [row for rank in per_rank for row in rank]:
        full.setdefault(name, {})[start] = values
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in full.items()}


@pytest.mark.parametrize(("cut", "stage", "checkpointing"), CASES)
def test_two_ranks_have_the_gradients_of_one(runs, cut, stage, checkpointing):
    expected_outcomes, expected = runs["one"][0][cut, 0, False]
    ranks = [rank[cut, stage, checkpointing] for rank in runs["two"]]
    for outcomes, _ in ranks:
        for outcome, wanted in zip(outcomes, expected_outcomes, strict=True):
            assert outcome["applied"]
            assert outcome["teacher_drift"] == 0
            for key in ("loss", "ce", "grad_norm"):
                assert outcome[key] == pytest.approx(wanted[key], rel=2e-5), key
    spans = sum(s for g in CUTS[cut] if g for s, _ in g)
    assert ranks[0][0][0]["spans"] == spans  # a filler's span is nobody's
    assert ranks[0][0][0]["latents"] == K * spans
    found = assembled([moments for _, moments in ranks])
    wanted = assembled([expected])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = torch.linalg.norm(found[name][: len(value)] - value)
        assert difference <= 1e-4 * torch.linalg.norm(value) + 1e-6, (name, difference)


def disagree() -> int:
    return largest_over_ranks(torch.device("cpu"))(5 - 3 * torch.distributed.get_rank())


def test_the_agreement_is_the_maximum():
    assert run_ranks(disagree, 2) == [5, 5]


def resume(folder: str) -> tuple[float, float]:
    """The third step's loss, straight through and after a restart from the second's checkpoint."""
    losses = []
    engine = engine_of(3, False)
    batches = step_batches("one rank has no span", 2)[engine.rank :][:1]
    for step in range(3):
        losses.append(train_step(engine, batches, lr=1e-3, noise_seed=step).loss)
        if step == 1:
            save_checkpoint(engine, folder + "/step-00000002", {"step": 2})
    engine.deepspeed.destroy()
    again = engine_of(3, False)
    load_checkpoint(again, folder + "/step-00000002")
    return losses[2], train_step(again, batches, lr=1e-3, noise_seed=2).loss


def test_a_run_without_a_teacher_resumes_bit_for_bit(tmp_path):
    for straight, resumed in run_ranks(resume, 2, str(tmp_path)):
        assert straight == resumed
