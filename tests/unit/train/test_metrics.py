import json
import math

import pytest

from ilvr_ds.errors import TrainingError
from ilvr_ds.train.compare import first_difference, summarise
from ilvr_ds.train.metrics import METRICS_FILE, MetricsWriter, read_metrics, truncate_metrics


def line(step: int, loss: float = 1.0) -> dict:
    return {
        "step": step,
        "loss": loss,
        "ce": loss,
        "align": 0.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "applied": True,
        "samples": 4,
        "tokens": 9,
        "latents_per_span": 8.0,
        "teacher_drift": 0.1 * step,
        "samples_per_s": 2.0,
        "tokens_per_s": 5.0,
        "step_s": 2.0,
        "mfu": None,
    }


def write(run, lines, first=0):
    run.mkdir(exist_ok=True)
    writer = MetricsWriter(run, total_steps=10, first_step=first, tensorboard=False)
    for one in lines:
        writer.write(one)
    writer.close()


def test_every_step_is_in_the_file_once_after_a_resume(tmp_path):
    write(tmp_path, [line(1), line(2), line(3)])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "loss": 1')  # cut by a kill
    truncate_metrics(tmp_path, last_step=2)
    write(tmp_path, [line(3, loss=0.5), line(4)], first=2)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 1.0)]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    write(tmp_path, [line(1), line(2, loss=math.nan), line(3, loss=math.inf)])
    text = (tmp_path / METRICS_FILE).read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [json.loads(row)["loss"] for row in text.splitlines()] == [1.0, None, None]
    assert summarise(tmp_path).first["loss"] == 1.0 and math.isnan(summarise(tmp_path).last["loss"])


def test_the_first_difference_is_named(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write(a, [line(1), line(2)])
    write(b, [line(1), line(2)])
    write(c, [line(1), line(2, loss=1.0000001)])
    assert first_difference(a, b) is None
    assert "step 2: loss" in first_difference(a, c)
    write(c, [line(3)])
    assert "has 2 steps" in first_difference(a, c) and "has 3" in first_difference(a, c)


def test_a_run_without_steps_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="no finished step"):
        summarise(tmp_path)
