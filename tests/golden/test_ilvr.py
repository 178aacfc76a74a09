"""Stage 1 equals the published implementation's recorded outputs, through the script a user runs."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def check(repository):
    def run(file):
        command = [sys.executable, str(repository / "tests/golden/check.py"), str(file)]
        return subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=280, check=False)

    return run


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


def test_every_case_alone_and_packed(check, golden):
    result = check(golden / "ilvr_open.safetensors")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 cases, alone and packed: all within tolerance" in result.stdout
    assert result.stdout.count(" alone ") == 7
    assert result.stdout.count(" packed ") == 7


@pytest.mark.parametrize("name", ["query", "teacher_latents"])
def test_a_wrong_tensor_is_found(check, altered, name):
    def change(tensors, description):
        only_first_case(tensors, description)
        tensors[f"case0.out.{name}"] += 1e-4

    result = check(altered(change))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "!" in result.stdout


@pytest.mark.parametrize("key", ["ce", "loss", "grad_norm"])
def test_a_wrong_number_is_found(check, altered, key):
    def change(tensors, description):
        only_first_case(tensors, description)
        description["cases"][0]["stage1"][key] *= 1.001

    assert check(altered(change)).returncode == 1


def test_another_number_of_targets_is_found(check, altered):
    def change(tensors, description):
        only_first_case(tensors, description)
        tensors["case0.out.teacher_latents"] = tensors["case0.out.teacher_latents"][:-1].clone()

    assert check(altered(change)).returncode == 1


def test_no_case_is_an_error(check, altered):
    result = check(altered(lambda tensors, description: description.update(cases=[])))
    assert result.returncode == 2
    assert "holds no case" in result.stderr


def test_an_unknown_kind_of_file_is_an_error(check, tmp_path):
    save_file({"case0.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "other.json").write_text(json.dumps({"cases": [{}]}))
    result = check(tmp_path / "other.safetensors")
    assert result.returncode == 2
    assert "not a stage-1 file" in result.stderr


def test_a_missing_description_is_an_error(check, tmp_path):
    save_file({"student.x": torch.zeros(1)}, tmp_path / "alone.safetensors")
    result = check(tmp_path / "alone.safetensors")
    assert result.returncode == 2
    assert "alone.json" in result.stderr
