"""`resting new`: a method that works, to be changed, and its test."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from resting.benchmarks.cells import registry
from resting.benchmarks.errors import BenchmarkError

LONGEST = 30
"""Characters of a name: with more, lines of what is written are too long."""

METHOD = r'''
"""$title: what it is, and whose (authors, year, arXiv number)."""

from __future__ import annotations

from typing import ClassVar

from resting import Rule, Site, Sparsifier, Statistics


class $cls(Sparsifier):
    r"""Magnitude thresholds on the input of every linear layer: where to start from.

    .. math:: keep_i = |x_i| > t, \qquad t = F^{-1}_{|x|}(s)

    with F the empirical distribution of |x| over calibration tokens and channels, and s the share of the inputs of a
    layer that should rest.
    """

    name: ClassVar[str] = "$name"

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].quantile(ratio))
'''

TEST = r'''
"""$title against its formula.$elsewhere"""

from __future__ import annotations
$imports
@torch.no_grad()
def test_the_thresholds_are_the_quantiles_of_the_magnitudes(llama, calibration):
    plan = $cls().plan_at(CalibratedModel(llama, calibration), 0.5)
    seen = []
    layer = llama.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 1:].abs().flatten()))
    llama(calibration.windows[: calibration.statistics_windows])
    handle.remove()
    # The oracle: the share of inputs at or below the threshold, of all tokens but the first.
    resting = (seen[0] <= plan.rules[Site(0, "down")].threshold).float().mean()
    assert float(resting) == pytest.approx(plan.info["ratios"]["0.down"], abs=0.01)


def test_the_measured_bytes_are_the_target(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    assert calibrated.measure($cls(target=0.4).plan_for(calibrated)) == pytest.approx(0.4, abs=0.01)
'''

CHECKOUT_IMPORTS = """
import pytest
import torch

from resting import CalibratedModel, Site
from resting.baselines.$module import $cls

"""

PACKAGE_IMPORTS = """
import pytest
import torch
from resting import CalibratedModel, Calibration, Site
from transformers import LlamaConfig, LlamaForCausalLM

from $module import $cls


@pytest.fixture
def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, initializer_range=0.15, **shape)).eval()


@pytest.fixture
def calibration():
    return Calibration(torch.randint(3, 97, (24, 32), generator=torch.Generator().manual_seed(2)))

"""

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "resting-$name"
version = "0.1.0"
description = "$title, a method for resting-neurons"
requires-python = ">=3.11"
dependencies = ["resting-neurons"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points."$group"]
$name = "$module:$cls"

[tool.setuptools]
py-modules = ["$module"]

[tool.pytest.ini_options]
pythonpath = ["."]

[tool.ruff]
line-length = 120

[tool.ruff.lint]
select = ["E", "F", "I", "B", "UP"]
"""


def in_checkout(name: str, folder: Path) -> list[Path]:
    """Write `name` into the checkout of this project that `folder` lies in.

    Returns
    -------
    list of Path
        The method in ``baselines/``, its test in ``tests/``.

    Raises
    ------
    BenchmarkError
        If there is no checkout, the name will not do, or a file exists; nothing is written then.
    """
    words = _words(name)
    root = next((f for f in (folder, *folder.parents) if _is_checkout(f)), None)
    if root is None:
        raise BenchmarkError(f"{folder} is in no checkout of resting-neurons: go to one, or give --package DIR")
    elsewhere = "\n\nWhat every method owes its users, tests/sparsifier/test_conformance.py asks of it by itself.\n"
    module, test = Template(METHOD), Template(TEST).safe_substitute(imports=CHECKOUT_IMPORTS, elsewhere=elsewhere)
    return _write(
        {
            root / "baselines" / f"{words['module']}.py": module.substitute(words),
            root / "tests" / "baselines" / f"test_{words['module']}.py": Template(test).substitute(words),
        }
    )


def package(name: str, folder: Path) -> list[Path]:
    """Write `name` as a package of its own into `folder`; installed, it is found by its entry point.

    Returns
    -------
    list of Path
        The project file, the method and its test.

    Raises
    ------
    BenchmarkError
        If the name will not do, or `folder` holds anything; nothing is written then.
    """
    words = _words(name)
    module = words["module"]
    if importlib.util.find_spec(module) is not None:
        raise BenchmarkError(f"name {name!r}: Python has a module {module} already; allowed: a name of its own")
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"--package {folder} is a file; allowed: a new or an empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise BenchmarkError(f"--package {folder} is not empty; allowed: a new or an empty folder")
    test = Template(TEST).safe_substitute(imports=PACKAGE_IMPORTS, elsewhere="")
    return _write(
        {
            folder / "pyproject.toml": Template(PROJECT).substitute(words),
            folder / f"{module}.py": Template(METHOD).substitute(words),
            folder / "tests" / f"test_{module}.py": Template(test).substitute(words),
        }
    )


def _words(name: str) -> dict[str, str]:
    """What the templates ask for, of a name that is free and can be one of a module and of a class."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST:
        raise BenchmarkError(
            f"name {name!r}; allowed: up to {LONGEST} lower-case letters and digits, with single '-' between words"
        )
    module, cls = name.replace("-", "_"), "".join(word.capitalize() for word in name.split("-"))
    taken = {"ClassVar", "Rule", "Site", "Sparsifier", "Statistics", "CalibratedModel", "Calibration"}
    if keyword.iskeyword(module) or keyword.iskeyword(cls) or cls in taken:
        raise BenchmarkError(f"name {name!r}: {module} or {cls} has a meaning already; allowed: a name of its own")
    if name in registry.named() or name in registry.skipped():
        raise BenchmarkError(f"name {name!r}: there is such a method; allowed: one that `resting list` does not show")
    title = name.replace("-", " ").capitalize()
    return {"name": name, "module": module, "cls": cls, "title": title, "group": registry.GROUP}


def _is_checkout(folder: Path) -> bool:
    return (
        all((folder / part / "__init__.py").is_file() for part in ("baselines", "sparsifier"))
        and (folder / "tests" / "sparsifier" / "test_conformance.py").is_file()
    )


def _write(files: dict[Path, str]) -> list[Path]:
    for file in files:
        if file.exists():
            raise BenchmarkError(f"{file} exists and is not overwritten: take another name")
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.lstrip("\n"))
    return list(files)
