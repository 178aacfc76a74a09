"""The GPU tests and the GPU benchmark, on the CPU: the same functions, so that a GPU is the only thing left to miss."""

import dataclasses
import importlib.util
import inspect
import itertools
import json
import subprocess
import sys
import time

import pytest
import torch

from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.model import varlen_attention


def load(repository, path):
    spec = importlib.util.spec_from_file_location(path.rpartition("/")[2].removesuffix(".py"), repository / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checks(repository):
    return load(repository, "tests/gpu/checks.py")


@pytest.fixture(scope="module")
def synthetic(checks):
    return checks.synthetic


# --------------------------------------------------------------------------------------- attention
UNEVEN = (150, 37, 1, 60, 200)


@pytest.mark.parametrize("heads", [(4, 2, 64, True), (3, 1, 128, True), (4, 4, 80, False)])
def test_the_attention_checks_pass_where_attention_is_right(checks, heads):
    case = checks.AttentionCase(UNEVEN, *heads, torch.float32)
    assert max(checks.attention_errors("sdpa", case, "cpu").values()) < 1e-5
    assert checks.attention_leaks("sdpa", case, "cpu", own=(1, 2, 3)) == []
    assert checks.available_backends("cpu", torch.bfloat16) == ["sdpa"]


class FlashRounding(torch.autograd.Function):
    """Attention of one sequence (n, H, d) with a flash kernel's roundings to bfloat16 and no others."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()  # not yet divided by their sum
        out = torch.einsum("hqk,khd->qhd", weights.bfloat16().float(), v.float()) / weights.sum(-1).T[..., None]
        ctx.save_for_backward(q, k, v, out.bfloat16(), scores.logsumexp(-1, keepdim=True), scores)
        ctx.scale = scale
        return out.bfloat16()

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, log_sum, scores = ctx.saved_tensors
        grad, weights = grad.float(), (scores - log_sum).exp()
        dv = torch.einsum("hqk,qhd->khd", weights.bfloat16().float(), grad)
        inner = torch.einsum("qhd,khd->hqk", grad, v.float()) - (grad * out.float()).sum(-1).T[..., None]
        ds = (weights * inner).bfloat16().float()
        dq, dk = torch.einsum("hqk,khd->qhd", ds, k.float()), torch.einsum("hqk,qhd->khd", ds, q.float())
        return (dq * ctx.scale).bfloat16(), (dk * ctx.scale).bfloat16(), dv.bfloat16(), None, None


def emulated(fault=None):
    """`varlen_attn` as torch 2.13 has it, computed by `FlashRounding`; `fault` makes it wrong."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        bounds = cu_q.tolist()
        if fault == "border off by one":
            bounds[1] += 1
        causal = window_size == (-1, 0) and fault != "no causal mask"
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if fault == "heads grouped wrongly":
            k = k.roll(1, dims=1)
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        factor = 0.8 if fault == "another scale" else 1.0
        return torch.cat([FlashRounding.apply(q[p], k[p], v[p], causal, scale * factor) for p in parts])

    return varlen_attn


@pytest.fixture
def with_kernel(monkeypatch):
    """Puts a function in the place of torch's kernel, under the project's own call of it."""

    def put(kernel):
        parameters = frozenset(inspect.signature(emulated()).parameters)
        monkeypatch.setattr(varlen_attention, "_torch_varlen_parameters", lambda: parameters)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)

    return put


@pytest.mark.parametrize("heads", [(4, 2, 64, True), (7, 1, 128, True), (4, 4, 80, False), (4, 2, 64, False)])
def test_a_flash_kernels_roundings_are_half_the_tolerance(checks, with_kernel, heads):
    with_kernel(emulated())
    case = checks.AttentionCase((*UNEVEN, 2, 90), *heads, torch.bfloat16)
    errors = checks.attention_errors("torch_varlen", case, "cpu")
    assert 1e-3 < max(errors.values()) < 0.015, errors
    assert checks.attention_leaks("torch_varlen", case, "cpu", own=(1, 2, 3)) == []


@pytest.mark.parametrize("fault", ["border off by one", "no causal mask", "another scale", "heads grouped wrongly"])
def test_a_wrong_kernel_is_beyond_the_tolerance(checks, with_kernel, fault):
    with_kernel(emulated(fault))
    case = checks.AttentionCase(UNEVEN, 4, 2, 64, True, torch.bfloat16)
    errors = checks.attention_errors("torch_varlen", case, "cpu")
    assert max(errors.values()) > 0.15, errors


def test_a_leak_of_any_size_is_found(checks, with_kernel):
    def leaking(q, k, v, *arguments, **options):
        right = emulated()
        return right(q, k, v + 0.01 * v.mean(0), *arguments, **options)

    with_kernel(leaking)
    case = checks.AttentionCase(UNEVEN, 4, 2, 64, True, torch.bfloat16)
    assert "out changed" in checks.attention_leaks("torch_varlen", case, "cpu", own=(1, 2, 3))
    assert "dv reaches neighbours" in checks.attention_leaks("torch_varlen", case, "cpu", own=(1, 2, 3))


# --------------------------------------------------------------------------------------- objective
def test_packed_equals_alone(checks):
    samples = checks.small_samples()
    for dtype, limits in (
        (torch.float32, {"ce": 1e-4, "align": 1e-5, "targets": 1e-5, "gradient": 1e-4}),
        (torch.bfloat16, {"ce": 0.15, "align": 0.01, "targets": 0.03, "gradient": 0.06}),
    ):
        objective = checks.small_objective("cpu", dtype, "sdpa")
        packed = checks.run_objective(objective, [checks.pack_small(samples, 3)])
        alone = checks.run_objective(objective, [checks.pack_small([sample], 3) for sample in samples])
        errors = checks.differences(packed, alone)
        assert all(errors[name] <= limit for name, limit in limits.items()), errors


def test_bfloat16s_rounding_is_a_third_of_the_gpu_tests_tolerance(checks):
    batch = checks.pack_small(checks.small_samples(), 3)
    exact, rounded = (
        checks.run_objective(checks.small_objective("cpu", dtype, "sdpa"), [batch])
        for dtype in (torch.float32, torch.bfloat16)
    )
    errors = checks.differences(rounded, exact)
    limits = {"ce": 0.05, "align": 0.01 / 3, "targets": 0.011, "gradient": 0.025}
    assert all(0 < errors[name] <= limit for name, limit in limits.items()), errors


def test_no_choice_of_the_small_samples_hangs_on_a_hair(checks):
    objective, batch = (
        checks.small_objective("cpu", torch.float32, "sdpa"),
        checks.pack_small(checks.small_samples(), 3),
    )
    before, generator = checks.selected_targets(objective, batch)[1], torch.Generator().manual_seed(1)
    assert len(batch.span_starts) == 6 and len(before) > 12
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    after = checks.selected_targets(objective, batch)[1]
    assert ((after - before).norm() / before.norm()) < 0.1  # a swap alone is 0.3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_decode_runs(checks, checkpointing):
    objective = checks.small_objective("cpu", torch.float32, "sdpa", checkpointing=checkpointing)
    checks.decode(objective, checks.pack_small(checks.small_samples(), 3))
    assert all(p.grad is not None for p in objective.student.language_model.layers.parameters())


def test_the_golden_check_runs_on_the_cpu(checks, golden):
    errors = checks.golden_errors(golden / "ilvr_open.safetensors", "cpu")
    assert errors.pop("grad_norm") < 1e-4
    assert 0 < max(errors.values()) < 1e-5, errors


def test_the_engine_checks_hold_on_the_cpu(repository, tmp_path):
    engine_checks = load(repository, "tests/gpu/engine_checks.py")
    (found,) = run_ranks(engine_checks.four_steps, 1, str(tmp_path), timeout_s=250)
    found = engine_checks.Findings(**found)
    assert found.device == "cpu" and found.inverse_frequencies == torch.float32
    assert all(o.applied and o.teacher_drift > 0 for o in found.outcomes)
    assert found.outcomes[-1].loss < found.outcomes[0].loss
    assert found.shadow_moved > 1e-3 and found.teacher_is_cast == [True] * 4
    assert found.query_new < 0.02 and found.query_old > 0.06
    assert found.resumed == found.outcomes[2:] and found.same_state


# --------------------------------------------------------------------------------------- benchmark
@pytest.mark.parametrize("name", ["3B", "7B"])
def test_shapes_are_the_published_ones(synthetic, realdata, name):
    shape = {"3B": synthetic.QWEN_3B, "7B": synthetic.QWEN_7B}[name]
    published = json.loads((realdata / "qwen2_5_vl_configs" / f"{name}.json").read_text())
    for key in set(shape.text) - {"rope_parameters"}:
        assert shape.text[key] == published[key], key
    for key, value in shape.vision.items():
        assert value == published["vision_config"][key], key
    assert shape.text["rope_parameters"]["mrope_section"] == published["rope_scaling"]["mrope_section"]
    assert shape.text["rope_parameters"]["rope_theta"] == published["rope_theta"]
    assert shape.tied == published["tie_word_embeddings"]
    for key in ("vision_start", "vision_end"):
        assert getattr(shape.vocabulary, key) == published[f"{key}_token_id"]
    assert shape.vocabulary.image_pad == published["image_token_id"]
    network = synthetic.random_network(shape.config(), device="meta", dtype=torch.bfloat16)
    tied = network.lm_head.weight is network.model.language_model.embed_tokens.weight
    assert tied == shape.tied and network.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert synthetic.random_network(shape.config(2), device="meta", dtype=torch.bfloat16).num_parameters() < 3e9


def test_samples_have_comts_lengths_and_pack(synthetic):
    samples = synthetic.random_samples(12, synthetic.QWEN_3B, 8, seed=1)
    lengths = synthetic.lengths_of(samples)
    images = [h * w // 4 for sample in samples for _, h, w in sample.grids]
    assert min(images) >= 95 and max(images) <= 1360  # sides are whole numbers
    assert lengths.spans.min() >= 1 and lengths.spans.max() <= 6
    totals = StepTotals(samples=12, supervised=1, spans=1, tokens=1)
    batch = pack(samples, synthetic.QWEN_3B.vocabulary, 8, totals=totals)
    assert len(batch.input_ids) == lengths.tokens.sum() and batch.pixels.shape == (lengths.patches.sum(), 588)
    assert len(batch.targets) == lengths.supervised.sum() and len(batch.span_starts) == lengths.spans.sum()
    again = synthetic.random_samples(12, synthetic.QWEN_3B, 8, seed=1)
    for a, b in zip(samples, again, strict=True):
        assert (a.input_pixels == b.input_pixels).all() and (a.helper_pixels == b.helper_pixels).all()


def test_the_published_schedule_runs_the_teacher_once_per_span_plus_once(checks, repository):
    schedule = load(repository, "benchmarks/published_schedule.py")
    assert schedule.one_each([[1, 2], [], [3]]) == [[1], [2], [3]]
    objective, calls = checks.small_objective("cpu", torch.float32, "sdpa"), []
    objective.teacher.language_model.register_forward_hook(lambda *_: calls.append(1))
    sample = max(checks.small_samples(), key=lambda s: len(s.grids))
    batch = checks.pack_small([sample], 1)
    assert len(batch.span_starts) == 2
    loss = objective(batch, 0).loss
    assert len(calls) == 1
    with schedule.repeated_teacher(objective.teacher):
        assert torch.equal(objective(batch, 0).loss, loss)
    assert len(calls) == 1 + 3
    objective(batch, 0)
    assert len(calls) == 1 + 3 + 1


def test_the_benchmark_runs_at_a_toy_size(repository, tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--samples-per-step", "4"]
    command += ["--steps", "1", "--checkpointing", "off", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "gpu.json").read_text())
    assert document["device"] == "CPU" and document["versions"]["deepspeed"] and document["parameters"] > 1e6
    published, *packed = document["rows"]
    assert published["schedule"] == "published" and published["micro_batches_per_step"] == 4
    assert [row["token_budget"] for row in packed] == [256, 512]
    for row in document["rows"]:
        assert row["result"] == "ok" and row["applied_steps"] == 1 and len(row["step_s"]) == 1
        assert row["tokens_per_step"] == published["tokens_per_step"]
        assert row["over_published"] == pytest.approx(row["samples_per_s"] / published["samples_per_s"])
        assert row["student_tflops_per_s"] * row["step_s"][0] == pytest.approx(
            published["student_tflops_per_s"] * published["step_s"][0]
        )
        assert row["student_tflops_per_s"] > row["teacher_tflops_per_s"] > 0 and 0 < row["ema_share"] < 1
        assert row["mfu_student"] is None and row["peak_memory_gib"] is None
        # the teacher repeats itself and each sample is weighted alike: the first losses are the same step's
        assert row["losses"][0] == pytest.approx(published["losses"][0], rel=0.05)


@pytest.fixture
def gpu(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return load(repository, "benchmarks/gpu.py")


def test_out_of_memory_is_a_result_and_other_errors_are_not(gpu, monkeypatch):
    """No GPU, so no memory to run out of: an engine that says so at its second token budget."""
    options = gpu.Options(gpu.TINY, None, "cpu", (512, 128, 256), 4, 1, 3)

    class Full:
        error = torch.cuda.OutOfMemoryError("full")

        def __init__(self, *_):
            pass

        def measure(self, budget, schedule):
            if (budget, schedule) == (256, "packed"):
                raise self.error
            return {"result": "ok", "samples_per_s": 2.0 if schedule == "published" else 6.0}

    monkeypatch.setattr(gpu, "Bench", Full)
    rows = gpu.measure_engine(options, "sdpa", True, deadline=time.time() + 60)
    assert [row["result"][:15] for row in rows] == ["ok", "ok", "oom", "not run: out of"]
    assert [row["token_budget"] for row in rows] == [None, 128, 256, 512]
    assert rows[1]["over_published"] == 3.0
    Full.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        gpu.measure_engine(options, "sdpa", True, deadline=time.time() + 60)


def test_nothing_starts_after_the_limit(gpu):
    options = gpu.Options(gpu.TINY, None, "cpu", (128,), 4, 1, 3)
    rows = gpu.measure_engine(options, "sdpa", False, deadline=time.time() - 1)
    assert [row["result"] for row in rows] == ["not run: --limit-s was reached"] * 2


def test_the_command_says_what_is_missing(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 1 and "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--backends", "torch_varlen"])
    assert gpu.main() == 1 and "it needs a CUDA device" in capsys.readouterr().err


def test_a_configuration_for_every_option(gpu):
    options = gpu.Options(gpu.QWEN_7B, 8, "cuda", (4096,), 20, 3, 0)
    recipe = options.recipe("torch_varlen", True)
    assert recipe.model.dtype == "bfloat16" and recipe.engine.deepspeed == "ds_configs/zero0.json"
    assert dataclasses.replace(options, zero_stage=3).recipe("sdpa", False).model.gradient_checkpointing is False
    assert options.shape.config(options.layers).text_config.num_hidden_layers == 8
