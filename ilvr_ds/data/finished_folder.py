"""Folders that are either complete or not there: written under another name, renamed when done.

A finished folder carries `settings.json`, what it was made with, so that asking for the same again is
free and asking for something else over it is an error.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ilvr_ds.errors import ConfigError

SETTINGS = "settings.json"


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` is already there, made with the same `settings` (plain JSON values).

    Raises `ConfigError` if something else is there: other settings (named), or files of unknown origin.
    An empty folder counts as not there.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder that does not exist yet")
    if not any(folder.iterdir()):
        return False
    try:
        there = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder}: is not empty and has no {SETTINGS}; choose a folder that does not exist yet"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{folder / SETTINGS}: not readable ({error}); delete the folder or choose another"
        ) from error
    if there == settings:
        return True
    different = "not a mapping"
    if isinstance(there, dict):
        keys = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
        different = "; ".join(f"{key}: {there.get(key)!r} there, {settings.get(key)!r} asked" for key in keys)
    raise ConfigError(f"{folder}: made with other settings ({different}); delete it or choose another folder")


@contextmanager
def write_folder(folder: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Hand out an empty folder beside `folder`; add `settings.json` and rename it to `folder` at the end.

    When the body raises, nothing is left. A killed process leaves a `.NAME.partial-PID` that can be deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.rename(partial, folder)  # atomic; replaces an empty folder, refuses one with files
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when renamed
