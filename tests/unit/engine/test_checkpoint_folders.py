"""Which folders count as checkpoints, and which are deleted."""

from ilvr_ds.engine.checkpoint import COMPLETE, complete_checkpoints, latest_checkpoint, prune_checkpoints


def make(parent, name, complete):
    (parent / name).mkdir(parents=True)
    (parent / name / "data").write_text("x")
    if complete:
        (parent / name / COMPLETE).touch()


def test_latest_is_the_highest_complete_step(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    make(tmp_path, "step-00000009", True)
    make(tmp_path, "step-00000010", True)
    make(tmp_path, "step-100000000", True)  # more digits than the name is padded to
    make(tmp_path, "step-200000000", False)
    make(tmp_path, "step-300000000.tmp", True)
    assert latest_checkpoint(tmp_path).name == "step-100000000"
    assert len(complete_checkpoints(tmp_path)) == 3


def test_prune_keeps_the_newest_and_whatever_is_newer_or_not_ours(tmp_path):
    for step in (1, 2, 3, 5):
        make(tmp_path, f"step-{step:08d}", True)
    make(tmp_path, "step-00000004", False)  # interrupted, older than the newest
    make(tmp_path, "step-00000005.tmp", False)
    make(tmp_path, "step-00000006.tmp", False)  # being written now
    make(tmp_path, "best", False)
    removed = prune_checkpoints(tmp_path, 2)
    assert [p.name for p in removed] == ["step-00000001", "step-00000002", "step-00000004", "step-00000005.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000003", "step-00000005", "step-00000006.tmp"]
    assert prune_checkpoints(tmp_path / "none", 2) == []
