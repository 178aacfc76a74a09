"""Folders are complete or absent, and never silently something else."""

import json

import pytest

from ilvr_ds.data.finished_folder import SETTINGS, is_finished, write_folder
from ilvr_ds.errors import ConfigError


def test_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "made"
    assert not is_finished(target, {"seed": 1})
    with write_folder(target, {"seed": 1}) as partial:
        (partial / "a.txt").write_text("a")
        assert not target.exists()
    assert {path.name for path in target.iterdir()} == {"a.txt", SETTINGS}
    assert [path.name for path in target.parent.iterdir()] == ["made"]
    assert is_finished(target, {"seed": 1})


def test_nothing_is_left_when_the_body_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), write_folder(tmp_path / "made", {}) as partial:
        (partial / "a.txt").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_named(tmp_path):
    with write_folder(tmp_path / "made", {"seed": 1, "count": 5}):
        pass
    with pytest.raises(ConfigError, match="count: 5 there, 6 asked") as caught:
        is_finished(tmp_path / "made", {"seed": 1, "count": 6})
    assert "seed" not in str(caught.value)


def test_a_folder_of_unknown_origin_is_refused(tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    assert not is_finished(target, {})  # empty: free to use
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="mine"):
        is_finished(target, {})
    with pytest.raises(OSError), write_folder(target, {}):  # even if nobody asked is_finished
        pass
    assert (target / "thesis.tex").read_text() == "years of work"
    (target / SETTINGS).write_text("{")
    with pytest.raises(ConfigError, match=SETTINGS):
        is_finished(target, {})
    (target / SETTINGS).write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="mine"):
        is_finished(target, {})
    with pytest.raises(ConfigError, match="is a file"):
        is_finished(target / "thesis.tex", {})


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "made").mkdir()
    with write_folder(tmp_path / "made", {}):
        pass
    assert is_finished(tmp_path / "made", {})
