"""What is given as input to the files it means: files, folders and patterns, as one list whose order is known."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ilvr_ds.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
_PATTERN = frozenset("*?[")


def input_files(given: Sequence[Path]) -> tuple[Path, ...]:
    """The files that `given` means, in its order; what a folder or a pattern holds comes sorted by name.

    FILE; FOLDER: all record files in it (SUFFIXES), which must be of one kind; or a pattern, `FOLDER/*.parquet`, `**`
    being any depth. Raises ConfigError: nothing there, several kinds in a folder, a file meant twice, another ending.
    """
    files = tuple(file for path in given for file in _files(path))
    twice = [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise ConfigError(f"--input {twice[0]}: given twice; a folder or a pattern may mean it too")
    return files


def input_name(files: Sequence[Path]) -> str:
    """What the manifest calls an input of several files; a single one by its name."""
    if len(files) == 1:
        return files[0].name
    return f"{files[0].name} ... {files[-1].name} ({len(files)} files)"


def joint_sha256(names_and_hashes: Sequence[tuple[str, str]]) -> str:
    """One hash for a list of files: of their names, hashes and order."""
    text = "".join(f"{sha256} {name}\n" for name, sha256 in names_and_hashes)
    return hashlib.sha256(text.encode()).hexdigest()


def id_stems(files: Sequence[Path]) -> tuple[str, ...]:
    """What the made-up ids of each file's records begin with: `train` for `train.jsonl.gz`; with the folder's name in
    front, for all, where two files share it. Raises ConfigError where that is the same again."""
    stems = tuple(record_stem(file) for file in files)
    if len(set(stems)) == len(stems):
        return stems
    longer = tuple(f"{file.resolve().parent.name}/{stem}" for file, stem in zip(files, stems, strict=True))
    for stem, count in Counter(longer).items():
        if count > 1:
            raise ConfigError(f"--input: {count} files are {stem!r}; records without id would get the same: rename one")
    return longer


def record_stem(path: Path) -> str:
    """The name of an input file without its endings: `train.jsonl.gz` and `train.parquet` are both `train`."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        kinds = sorted(
            {"".join(file.suffixes[-2:]) if file.suffix in (".gz", ".zst") else file.suffix for file in found}
        )
        if len(kinds) > 1:
            raise ConfigError(f"--input {path}: holds {', '.join(kinds)}; name one kind: '{path / f'*{kinds[0]}'}'")
    elif not path.exists() and _PATTERN & set(str(path)):
        root = Path(path.anchor or ".")
        found = sorted(file for file in root.glob(str(path.relative_to(path.anchor))) if file.is_file())
    else:
        found = [path]
    if not found:
        raise ConfigError(f"--input {path}: no record files there; allowed endings: {', '.join(SUFFIXES)}")
    for file in found:
        if not file.is_file():
            raise ConfigError(f"--input {file}: no such file")
        if not file.name.endswith(SUFFIXES):
            raise ConfigError(f"--input {file}: unknown ending; allowed: {', '.join(SUFFIXES)}")
        yield file
