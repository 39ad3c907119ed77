"""Arrows between rooms run one way and on few levels, files stay small, and nothing reaches into another's own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"sparsifier": set(), "baselines": {"sparsifier"}, "method": {"sparsifier"}}
ROOMS["benchmarks"] = {"sparsifier", "baselines", "method"}
LEVELS = (
    {"errors", "provenance", "progress", "names", "labels"},
    {"cache", "documents", "events"},
    {"assets"},
    {"cells"},
    {"quality", "again"},
    {"report", "latency", "sweep"},
    {"run", "studies", "checks", "page", "fitting", "using", "submit"},
    {"cli"},
)
"""Of the rooms in benchmarks/, from the bottom: a room imports those below it, and itself."""
SLOW = {
    *("latency.gpu.timer", "quality.tasks.lm", "quality.vocabulary_kernel", "sparsifier.mask_kernel"),
    *("sparsifier.decoding.cuda_products", "sparsifier.decoding.cuda_layouts", "sparsifier.decoding.cpu_products"),
    "sparsifier.decoding.cuda_union",
    *("sparsifier.decoding.cuda.single", "sparsifier.decoding.cuda.choice"),
    *("sparsifier.decoding.step.cpu_step", "sparsifier.decoding.step.cuda_step"),
}
"""Modules that need a package which a user may lack, or which is slow to import: imported where they are used."""
LARGEST_FILE, LARGEST_FOLDER, LARGEST_BASE_CLASS = 400, 2000, 150
MICRO = ROOT / "benchmarks" / "micro"
FILES = [path for folder in ROOMS for path in sorted((ROOT / folder).rglob("*.py")) if MICRO not in path.parents]


def name_of(path: Path) -> str:
    """Dotted name below ``resting``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in FILES}


def imports(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Every import of a module of the project, with the name of the module below ``resting``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                known = module.removeprefix("resting.") in NAMES
                found.append((node, module if known else node.module))
    return [(node, name.removeprefix("resting.")) for node, name in found if name.startswith("resting.")]


def room(name: str) -> str:
    """The room of a module: a folder or a file in benchmarks/, else the folder at the top."""
    parts = name.split(".")
    return parts[1] if parts[0] == "benchmarks" and len(parts) > 1 else parts[0]


PARSED = {name: ast.parse(path.read_text()) for name, path in NAMES.items()}
ARROWS = {name: {target for _, target in imports(tree) if target in NAMES} for name, tree in PARSED.items()}


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name):
    folder = name.split(".")[0]
    assert {target.split(".")[0] for _, target in imports(PARSED[name])} <= ROOMS[folder] | {folder}


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("benchmarks.")])
def test_rooms_of_the_harness_import_what_lies_below_them(name):
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    mine = room(name)
    for target in ARROWS[name]:
        theirs = room(target)
        if target.startswith("benchmarks.") and theirs != mine:
            assert level[theirs] < level[mine], f"{name} imports {target}"


def test_every_room_has_a_level_and_there_are_at_most_eight():
    assert {room(name) for name in NAMES if name.startswith("benchmarks.")} == set.union(*LEVELS)
    assert len(LEVELS) <= 8


def test_no_imports_go_in_a_circle():
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in state:
            state[name] = 1
            for target in sorted(ARROWS[name]):
                visit(target, (*path, name))
            state[name] = 2

    for name in sorted(ARROWS):
        visit(name, ())


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("benchmarks.cli")])
def test_own_modules_are_imported_at_the_top(name):
    functions = [n for n in ast.walk(PARSED[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {target for function in functions for _, target in imports(function)}
    assert {target.removeprefix("benchmarks.") for target in inside} <= SLOW


@pytest.mark.parametrize("name", NAMES)
def test_no_module_reaches_into_another(name):
    tree = PARSED[name]
    bound = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resting.")
        for alias in node.names
        if f"{node.module}.{alias.name}".removeprefix("resting.") in NAMES
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resting."):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            assert not node.attr.startswith("_"), f"{name} uses {node.value.id}.{node.attr}"


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small(name):
    assert len(NAMES[name].read_text().splitlines()) <= LARGEST_FILE


def test_folders_are_small():
    sizes: dict[Path, int] = {}
    for path in (path for name, path in NAMES.items() if name.startswith("benchmarks.")):
        sizes[path.parent] = sizes.get(path.parent, 0) + len(path.read_text().splitlines())
    assert not {folder for folder, lines in sizes.items() if lines > LARGEST_FOLDER}


def test_the_base_class_is_small():
    tree = PARSED["sparsifier.base"]
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert found.name == "Sparsifier"
    assert found.end_lineno - found.lineno + 1 <= LARGEST_BASE_CLASS
