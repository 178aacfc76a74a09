"""The rules of the house: imports go one way, only the engine knows DeepSpeed, the README's map is the tree."""

import ast
import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

# A module may import from parts at the same place or further left, never from the right.
ORDER = ["base", "data", "model", "objective", "engine", "train"]
MAY_IMPORT = {part: set(ORDER[: i + 1]) for i, part in enumerate(ORDER)} | {
    "inference": {"base", "data", "model", "inference"}
}
BASE_MODULES = {"contracts", "config", "recipe_rules", "errors"}


def part_of(module: str) -> str:
    name = module.split(".")[1] if "." in module else "base"
    return "base" if name in BASE_MODULES else name


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            module = node.module or ""
            found.add(module)
            if module == "ilvr_ds":
                found |= {f"ilvr_ds.{alias.name}" for alias in node.names}
    return found


def violations(root: Path) -> list[str]:
    wrong = []
    for path in sorted((root / "ilvr_ds").rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        part = part_of(module.removesuffix(".__init__"))
        for imported in imports_of(path):
            if imported.startswith("ilvr_ds.") and part_of(imported) not in MAY_IMPORT.get(part, set()):
                wrong.append(f"{module} ({part}) imports {imported} ({part_of(imported)})")
            if imported.split(".")[0] == "deepspeed" and part != "engine":
                wrong.append(f"{module} imports deepspeed; only ilvr_ds.engine may")
            if imported.split(".")[0] in {"launch", "data_tools", "tests", "benchmarks"}:
                wrong.append(f"{module} imports {imported}: the package does not know its scripts")
    for path in sorted((root / "data_tools").glob("*.py")):
        for imported in imports_of(path):
            if imported.startswith("ilvr_ds.") and part_of(imported) not in {"base", "data"}:
                wrong.append(f"data_tools/{path.name} imports {imported}: data tools know nothing of training")
    return wrong


def test_imports_go_one_way(repository):
    assert violations(repository) == []


def test_the_import_test_can_fail(tmp_path):
    for part, line in [
        ("data", "from ilvr_ds.engine import step"),
        ("model", "import deepspeed"),
        ("objective", "import ilvr_ds.train.loop"),
    ]:
        (tmp_path / "ilvr_ds" / part).mkdir(parents=True)
        (tmp_path / "ilvr_ds" / part / "bad.py").write_text(line + "\n")
    (tmp_path / "data_tools").mkdir()
    assert len(violations(tmp_path)) == 3


def tracked(root: Path) -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.splitlines() if (root / name).exists()]


def readme_map(root: Path) -> set[str]:
    """Paths named in the README's map: the indented tree between the markers `<!-- map -->`."""
    text = (root / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- map -->\s*```\n(.*?)```\s*<!-- /map -->", text, re.S)
    assert block, "README.md has no map between <!-- map --> and <!-- /map -->"
    stack: list[tuple[int, str]] = []
    paths = set()
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        names = line.split("  ")[0].strip() if indent == 0 else re.split(r"\s{2,}", line.strip())[0]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        prefix = "".join(name for _, name in stack)
        for name in names.split(", "):
            paths.add(prefix + name)
        if names.endswith("/"):
            stack.append((indent, names))
    return paths


def test_readme_map_is_the_tree(repository):
    """Every path in the map exists, and every Python file and folder of the product is in the map."""
    mapped = readme_map(repository)
    missing = [path for path in mapped if not (repository / path).exists()]
    assert missing == [], f"named in README's map but not there: {missing}"
    expected = {
        name
        for name in tracked(repository)
        if name.split("/")[0] in {"ilvr_ds", "data_tools", "launch", "benchmarks", "ds_configs"}
        and not name.endswith("__init__.py")
    }
    # A folder named with a pattern, such as launch/recipes/, stands for what is in it where no file is listed.
    listed_folders = {
        path
        for path in mapped
        if path.endswith("/") and not any(other != path and other.startswith(path) for other in mapped)
    }
    absent = sorted(
        name
        for name in expected
        if name not in mapped and not any(name.startswith(folder) for folder in listed_folders)
    )
    assert absent == [], f"there but not in README's map: {absent}"


def test_every_recipe_key_is_read_by_something(repository):
    """A key nobody reads would be a promise nobody keeps."""
    import dataclasses

    from ilvr_ds.config import Recipe

    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (repository / "ilvr_ds").rglob("*.py") if path.name != "config.py"
    )
    unread = []
    hints = {f.name: f for f in dataclasses.fields(Recipe)}
    import typing

    for section, kind in typing.get_type_hints(Recipe).items():
        if section in hints and dataclasses.is_dataclass(kind):
            for f in dataclasses.fields(kind):
                if not re.search(
                    rf"\b{section}\.{f.name}\b|\b(config|{section}|{section}_config|cfg)\.{f.name}\b", sources
                ):
                    unread.append(f"{section}.{f.name}")
    assert unread == []


def test_every_test_folder_is_collected(repository, pytestconfig):
    """pytest passes over folders by name without a word, `dist` among them by default."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in (repository / "tests").rglob("test_*.py")}
    parts = {part for folder in folders for part in folder.relative_to(repository).parts}
    assert "dist" in parts
    assert [part for part in sorted(parts) if any(fnmatch.fnmatch(part, pattern) for pattern in patterns)] == []


def test_no_file_grows_past_a_page_of_reason(repository):
    """Files stay under 300 lines; a longer one must be named here with its reason."""
    allowed: dict[str, str] = {}
    long = {
        name: lines
        for name in tracked(repository)
        if name.endswith(".py")
        and name.startswith(("ilvr_ds/", "data_tools/", "launch/"))
        and (lines := len((repository / name).read_text(encoding="utf-8").splitlines())) > 300
        and name not in allowed
    }
    assert long == {}
