"""A slice of benchmarks/fuzz.py: mutated images, records and input files end built or refused, nothing else."""

import json
import subprocess
import sys


def test_a_slice_of_the_fuzzer(repository, tokenizer_folder):
    command = [sys.executable, "-m", "benchmarks.fuzz", "--tokenizer", str(tokenizer_folder), "--count", "400"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    report = json.loads(done.stdout)
    assert report["wrong"] == [] and report["noise"] == ""
    assert done.returncode == 0 and report["lost"] == 0
    assert report["built"] + report["rejected"] + report["refused_files"] == 400
    assert report["built"] > 40 and report["rejected"] > 40  # it tries both sides
