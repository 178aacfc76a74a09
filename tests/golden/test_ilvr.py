"""Both stages equal the published implementation's recorded outputs, through the script a user runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("check.py")


def check(file) -> subprocess.CompletedProcess:
    """The script as a user starts it."""
    command = [sys.executable, str(SCRIPT), str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def main():
    """The script's entry in this process; a start of Python and torch for each altered file would take minutes."""
    spec = importlib.util.spec_from_file_location("golden_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def altered(golden, tmp_path):
    """Writes a copy of the golden file with its tensors and description changed by the caller."""

    def write(change):
        tensors = load_file(golden / "ilvr_open.safetensors")
        description = json.loads((golden / "ilvr_open.json").read_text())
        change(tensors, description)
        save_file(tensors, tmp_path / "altered.safetensors")
        (tmp_path / "altered.json").write_text(json.dumps(description))
        return tmp_path / "altered.safetensors"

    return write


def only_first_case(tensors, description):
    description["cases"] = description["cases"][:1]


def test_every_case_alone_and_packed(golden):
    result = check(golden / "ilvr_open.safetensors")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 cases, alone and packed: all within tolerance" in result.stdout
    rows = [line.split()[:2] for line in result.stdout.splitlines()]
    for number in range(7):
        assert [f"case{number}", "alone"] in rows
        assert [f"case{number}", "packed"] in rows
    assert "loss2" in result.stdout
    assert "   -" not in "".join(line for line in result.stdout.splitlines() if line.startswith("case0"))


@pytest.mark.parametrize("name", ["query", "teacher_latents", "stage1_logits_tail", "stage2_logits_tail"])
def test_a_wrong_tensor_is_found(main, altered, capsys, name):
    def change(tensors, description):
        only_first_case(tensors, description)
        tensors[f"case0.out.{name}"] += 1e-3

    assert main([str(altered(change))]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "key"),
    [("stage1", "ce"), ("stage1", "loss"), ("stage1", "grad_norm"), ("stage2", "loss"), ("stage2", "grad_norm")],
)
def test_a_wrong_number_is_found(main, altered, stage, key):
    def change(tensors, description):
        only_first_case(tensors, description)
        description["cases"][0][stage][key] *= 1.001

    assert main([str(altered(change))]) == 1


def test_another_number_of_targets_is_found(main, altered):
    def change(tensors, description):
        only_first_case(tensors, description)
        tensors["case0.out.teacher_latents"] = tensors["case0.out.teacher_latents"][:-1].clone()

    assert main([str(altered(change))]) == 1


def test_another_filled_mask_is_found(main, altered):
    def change(tensors, description):
        only_first_case(tensors, description)
        mask = tensors["case0.out.filled_mask"]
        mask[mask.nonzero()[-1]] = False

    assert main([str(altered(change))]) == 1


def test_a_file_without_a_case_is_an_error(main, altered, capsys):
    assert main([str(altered(lambda tensors, description: description.update(cases=[])))]) == 2
    assert "holds no case" in capsys.readouterr().err


def test_an_unknown_kind_of_file_is_an_error(tmp_path):
    save_file({"case0.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "other.json").write_text(json.dumps({"cases": [{}]}))
    result = check(tmp_path / "other.safetensors")
    assert result.returncode == 2
    assert "not a stage-1 file" in result.stderr


def test_a_missing_description_is_an_error(main, tmp_path, capsys):
    save_file({"student.x": torch.zeros(1)}, tmp_path / "alone.safetensors")
    assert main([str(tmp_path / "alone.safetensors")]) == 2
    assert "alone.json" in capsys.readouterr().err
