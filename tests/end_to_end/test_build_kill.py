"""A build killed at random moments and started again gives the bytes of an undisturbed one. Few kills; the full number
is `benchmarks/build_kill.py`."""

import json


def test_killed_builds_end_with_the_same_bytes(program, tmp_path):
    options = ["--kinds", "group", "worker", "--kills", 4, "--records", 96, "--out", tmp_path / "result.json"]
    program("benchmarks/build_kill.py", *options)  # exit code 1 if any folder came out different
    kills = json.loads((tmp_path / "result.json").read_text())["kills"]
    assert {kind: count["runs"] for kind, count in kills.items()} == {"group": 2, "worker": 2}
    assert all(count["different"] == count["temporary_files_left"] == 0 for count in kills.values())
