"""Methods from other packages by entry point, and `resting new`, which writes one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
from conformance import conforms
from typer.testing import CliRunner

from resting.benchmarks.cells import registry, suite_file
from resting.benchmarks.cli import main, new_method
from resting.benchmarks.errors import BenchmarkError, SuiteError
from resting.benchmarks.run import cells_of

ROOT = Path(__file__).parents[2]
ROOMS = ("sparsifier", "baselines", "method", "benchmarks")
SUITE = 'name = "mine"\ntitle = "Mine"\ntargets = [0.5]\n[[methods]]\nname = "{}"\n'


def install(site: Path, package: str, entries: dict[str, str]) -> None:
    """What pip leaves of a package: here only its metadata."""
    folder = site / f"{package.replace('-', '_')}-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in entries.items())
    (folder / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{lines}\n")
    registry._found.cache_clear()  # no process of a user's has a package more than when it began


def resting(*arguments: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, in a process that finds packages in `path`."""
    environment = os.environ | {
        "PYTHONPATH": str(path),
        "RESTING_CACHE": str(cwd / "cache"),
        "COLUMNS": "200",
    }
    command = [sys.executable, "-P", "-m", "resting.benchmarks.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that Python finds packages in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def own(site):
    """A package that `resting new` wrote, installed."""
    new_method.package("tenth-try", site / "source")
    project = tomllib.loads((site / "source" / "pyproject.toml").read_text())["project"]
    shutil.copy(site / "source" / "tenth_try.py", site)
    install(site, project["name"], project["entry-points"][registry.GROUP])
    yield
    sys.modules.pop("tenth_try", None)


BROKEN = {
    "raising": ("raise ImportError('no flux\\nmore')", "ImportError: no flux (entry point"),
    "leaving": ("raise SystemExit(3)", "SystemExit: 3"),
    "no-class": ("x = 1", "AttributeError: module 'no_class' has no attribute 'Method'"),
    "no-method": ("class Method: pass", "is not a concrete subclass of resting.Sparsifier with a name"),
    "otherwise": (
        "from resting.baselines.cats import Cats\nclass Method(Cats):\n    name = 'cats-two'",
        "the class is named 'cats-two': entry point and class must agree",
    ),
    "teal": (
        "from resting.baselines.cats import Cats\nclass Method(Cats):\n    name = 'teal'",
        "a method of this project has this name",
    ),
    "greedy": (
        "from resting.baselines.cats import Cats\n"
        "class Method(Cats):\n    name = 'greedy'\n    variants = {'teal-greedy': {}}",
        "its variant 'teal-greedy' is a method of this project",
    ),
    "spaced": (
        "from resting.baselines.cats import Cats\nclass Method(Cats):\n    name = 'a b'",
        "is named 'a b'; allowed: letters",
    ),
}


@pytest.fixture
def broken(site):
    for name, (code, _) in BROKEN.items():
        (site / f"{name.replace('-', '_')}.py").write_text(code + "\n")
    install(site, "broken", {name: f"{name.replace('-', '_')}:Method" for name in BROKEN})
    yield
    for name in BROKEN:
        sys.modules.pop(name.replace("-", "_"), None)


def test_an_installed_method_is_listed_and_runs_with_no_flag(own, site, tmp_path, monkeypatch, capsys):
    """Listed in a process of its own, and planned in this one, whose packages are the same."""
    (site / "raising.py").write_text("raise ImportError('no flux')\n")
    install(site, "broken", {"raising": "raising:Method"})
    listed = resting("list", path=site, cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    lines = [" ".join(line.replace("|", " ").split()) for line in listed.stdout.splitlines()]
    assert any(line.startswith("tenth-try Masks the input of every linear layer") for line in lines)
    assert any(line.startswith("raising skip -> ImportError: no flux (entry point 'raising:Method'") for line in lines)
    assert any(line.startswith("teal Masks the input") for line in lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    model = str(tiny.model_folder(tmp_path / "model"))  # the default one would be fetched into the empty cache
    more = "".join(f'[[methods]]\nname = "{name}"\n' for name in ("tenth-try", "spon(tenth-try)"))
    (tmp_path / "mine.toml").write_text(tiny.SUITE + more)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--dry-run", "--model", model) == 0
    planned = capsys.readouterr().out
    assert "\n  tenth-try " in planned
    assert "\n  spon(tenth-try) " in planned
    (tmp_path / "mine.toml").write_text(SUITE.format("raising"))
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--dry-run") == 2
    refused = capsys.readouterr().err
    assert refused.startswith("error: method 'raising' is skipped: ImportError: no flux")
    assert len(refused.splitlines()) == 1


def test_an_installed_method_conforms(own, model, ids, calibration, tmp_path):
    conforms(registry.methods()["tenth-try"], {}, model, ids, calibration, tmp_path)


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "teal"])
def test_a_broken_entry_point_is_named_and_breaks_no_other(broken, own, tmp_path, name):
    assert BROKEN[name][1] in registry.skipped()[name]
    assert {"tenth-try", "teal", "spon"} <= set(registry.methods())
    (tmp_path / "mine.toml").write_text(SUITE.format(f"spon({name})"))
    with pytest.raises(SuiteError, match=f"method '{name}' is skipped: "):
        cells_of(suite_file.load(str(tmp_path / "mine.toml")))
    assert cells_of(suite_file.load("smoke"))


def test_an_entry_point_does_not_take_the_place_of_a_method_of_this_project(broken):
    assert registry.methods()["teal"].__module__ == "resting.baselines.teal"
    assert BROKEN["teal"][1] in registry.skipped()["teal"]


def test_of_two_packages_with_one_name_the_first_is_taken(own, site):
    (site / "second.py").write_text("from tenth_try import TenthTry\n")
    install(site, "second", {"tenth-try": "second:TenthTry"})
    assert registry.methods()["tenth-try"].__module__ in ("second", "tenth_try")
    assert "has a method of this name as well" in registry.skipped()["tenth-try"]


def test_an_unknown_method_is_answered_with_what_was_skipped(broken):
    with pytest.raises(SuiteError, match=r"unknown method 'xylophone'; .*; skipped: greedy, leaving, no-class"):
        registry.build("xylophone", 0.5)


@pytest.mark.parametrize("path", ["tenth_try:TenthTry", "tenth_try.TenthTry"])
def test_a_class_is_named_with_a_colon_or_a_dot(own, path):
    assert registry.load_class(path).name == "tenth-try"


@pytest.fixture
def checkout(tmp_path):
    """A copy of this project, as git has it; a method may be dropped into it."""
    folder = tmp_path / "checkout"
    for part in ("resting", *ROOMS, "tests/helpers"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "sparsifier").mkdir()
    for file in ("tests/conftest.py", "tests/sparsifier/test_conformance.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / file)
    (links := folder / "links").mkdir()  # as an editable installation has it
    shutil.copytree(folder / "resting", links / "resting")
    for part in ROOMS:
        (links / "resting" / part).symlink_to(folder / part)
    return folder


def check(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "links")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


NEW_TWICE = """
import sys
from resting.benchmarks.cells import registry
from resting.benchmarks.cli import main
for wanted in (0, 2):
    registry._found.cache_clear()  # as another process has it
    sys.argv = ["resting", "new", "tenth-try"]
    try:
        main.main()
    except SystemExit as stop:
        assert (stop.code or 0) == wanted, stop.code
"""


def test_a_stub_in_the_checkout_passes_what_the_project_asks(checkout):
    done = subprocess.run(
        [sys.executable, "-P", "-c", NEW_TWICE],
        cwd=checkout / "benchmarks",  # from any folder inside
        env=os.environ | {"PYTHONPATH": str(checkout / "links"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "there is such a method" in done.stderr
    files = [Path(line.removeprefix("wrote ")) for line in done.stdout.splitlines()]
    assert [str(f.relative_to(checkout)) for f in files] == [
        "baselines/tenth_try.py",
        "tests/baselines/test_tenth_try.py",
    ]
    check(
        checkout, "pytest", "-k", "tenth", "tests/baselines/test_tenth_try.py", "tests/sparsifier/test_conformance.py"
    )
    if shutil.which("ruff", path=str(Path(sys.executable).parent)):
        names = [str(f) for f in files]
        check(checkout, "ruff", "check", "--no-cache", *names)
        check(checkout, "ruff", "format", "--no-cache", "--check", *names)


@pytest.mark.parametrize("name", ["zz-last", "a-name-of-thirty-characters-xx"])
def test_a_stub_package_passes_its_own_test(tmp_path, name):
    folder = tmp_path / "package"
    files = new_method.package(name, folder)
    assert folder / "pyproject.toml" in files
    if name == "zz-last":  # of a long name, only the layout of lines is another
        check(folder, "pytest", "-q", "-p", "no:cacheprovider")
    if shutil.which("ruff", path=str(Path(sys.executable).parent)):
        check(folder, "ruff", "check", "--no-cache", ".")
        check(folder, "ruff", "format", "--no-cache", "--check", ".")


def test_a_broken_file_in_baselines_is_reported_and_breaks_no_other(checkout):
    new_method.in_checkout("tenth-try", checkout)
    (checkout / "baselines" / "half.py").write_text("def (\n")
    listed = resting("list", path=checkout / "links", cwd=checkout)
    assert listed.returncode == 0, listed.stderr
    assert "skip -> SyntaxError" in listed.stdout
    assert "teal-greedy" in listed.stdout
    assert "tenth-try" in listed.stdout


def test_nothing_of_this_project_is_skipped():
    assert not [name for name in registry.skipped() if name.startswith(("resting.",))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Teal", "name 'Teal'; allowed: up to 30 lower-case letters and digits, with single '-' between words"),
        ("", "name ''; allowed"),
        ("../up", "name '../up'; allowed"),
        ("a/b", "name 'a/b'; allowed"),
        ("two--dashes", "allowed: up to 30 lower-case"),
        ("1st", "allowed: up to 30 lower-case"),
        ("a" * 31, "allowed: up to 30 lower-case"),
        ("import", "import or Import has a meaning already"),
        ("none", "none or None has a meaning already"),
        ("sparsifier", "sparsifier or Sparsifier has a meaning already"),
        ("teal", "there is such a method"),
        ("teal-greedy", "there is such a method"),
    ],
)
@pytest.mark.parametrize("where", ["checkout", "package"])
def test_bad_names_write_nothing(tmp_path, name, message, where):
    for file in ("baselines/__init__.py", "sparsifier/__init__.py", "tests/sparsifier/test_conformance.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BenchmarkError, match=message.replace("(", r"\(")):
        new_method.in_checkout(name, tmp_path) if where == "checkout" else new_method.package(name, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_files_and_folders_are_left_alone(tmp_path):
    with pytest.raises(BenchmarkError, match="is in no checkout of resting-neurons: go to one, or give --package DIR"):
        new_method.in_checkout("eleventh", tmp_path)
    with pytest.raises(BenchmarkError, match="Python has a module json already"):
        new_method.package("json", tmp_path / "json")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BenchmarkError, match="is a file; allowed: a folder"):
        new_method.package("eleventh", tmp_path / "thesis.txt")
    for file in (
        "baselines/__init__.py",
        "sparsifier/__init__.py",
        "tests/sparsifier/test_conformance.py",
        "tests/baselines/test_eleventh.py",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(BenchmarkError, match=r"test_eleventh.py exists and is not overwritten"):
        new_method.in_checkout("eleventh", tmp_path)
    assert not (tmp_path / "baselines" / "eleventh.py").exists()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_new_with_a_package(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = CliRunner().invoke(main.app, ["new", "tenth-try", "--package", str(tmp_path)])
    assert done.exit_code == 0
    assert done.output.count("wrote ") == 3
    assert "pyproject.toml" in done.output
    assert "entry-points" not in done.output


@pytest.mark.parametrize("project", ["pyproject.toml", "setup.py", "setup.cfg"])
def test_new_in_a_repository_that_is_a_project_already(tmp_path, project):
    (tmp_path / project).write_text("# mine\n")
    done = CliRunner().invoke(main.app, ["new", "tenth-try", "--package", str(tmp_path)])
    assert done.exit_code == 0
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [project, "tenth_try.py", "tests/test_tenth_try.py"]
    )
    assert (tmp_path / project).read_text() == "# mine\n"
    added = "\n".join(line for line in done.output.splitlines() if line.startswith("    "))
    assert tomllib.loads(added) == {"project": {"entry-points": {registry.GROUP: {"tenth-try": "tenth_try:TenthTry"}}}}


@pytest.mark.parametrize("taken", ["tenth_try.py", "tests/test_tenth_try.py", "tenth_try/__init__.py", "tests"])
def test_new_in_a_repository_overwrites_nothing_and_writes_nothing_beside(tmp_path, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(BenchmarkError, match=r"is not overwritten|has a module tenth_try|is a file where a folder"):
        new_method.package("tenth-try", tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / taken]
