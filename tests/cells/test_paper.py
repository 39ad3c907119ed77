"""The suites of SPON's own tables, end to end on folders in place of hub models, with little text and few steps."""

from __future__ import annotations

import random
import re

import pandas as pd
import pytest
import tiny
from families import build

from resting.benchmarks.assets import texts
from resting.benchmarks.cells import literature, registry, suite_file
from resting.benchmarks.report.compared.literature import at_thresholds, is_counterpart

MODELS = {
    "Llama-3.1-8B-Instruct": "llama",
    "Mistral-7B-Instruct-v0.2": "mistral",
    "Qwen3-8B": "qwen3",
}
FEW = ("dense", "teal", "spon(teal)", "spon-refined(teal)", "larosa", "spon(larosa)", "wina-rotated")
"""Methods of the suite that are run here: of the stacking one wrapped and one that is rotated."""
LITTLE = [
    (r"targets = \[0\.25, 0\.50, 0\.60\]", "targets = [0.50]"),
    (r"steps = \d+, batch = \d+", "steps = 2, batch = 2"),
    (r"window = 128", "window = 16"),
    (r"steps = 60, window = 512, batch = 8", "steps = 2, window = 16, batch = 2"),
    (r"match_every = \d+", "match_every = 1"),
    (r"window = 512\nstatistics_windows = 64\nmatching_windows = 24", "window = 16\nstatistics_windows = 4"),
    (r"statistics_windows = 4", "statistics_windows = 4\nmatching_window = 16\nmatching_windows = 2"),
    (r"window = 4096\nbatch_size = 1", "window = 16\nwindows = 4\nbatch_size = 1"),
]


def shrunk(name, folder, only=None):
    """The suite with little text and short trainings, or `only` its methods so named; `folder` gets the file."""
    text = (suite_file.FOLDER / f"{name}.toml").read_text()
    for pattern, little in LITTLE:
        text = re.sub(pattern, little, text)
    head, *methods = text.split("[[methods]]")
    known = {*registry.named(), "dense"}
    wanted = [m for m in methods if _innermost(m) in known and (only is None or _name(m) in only)]
    text = head + "".join(f"[[methods]]{m}" for m in wanted)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def _name(method):
    return re.search(r'name = "([^"]+)"', method)[1]


def _innermost(method):
    return _name(method).split("(")[-1].rstrip(")")


@pytest.fixture
def made_up(monkeypatch):
    """Texts of words that the tiny tokenizer knows, in place of what the hub and the package give."""
    tiny.provide_texts(monkeypatch)
    chosen = random.Random(1)
    documents = [" ".join(chosen.choices(tiny.WORDS, k=60)) for _ in range(60)]
    for name, of in texts.CORPORA.items():
        monkeypatch.setitem(texts.CORPORA, name, texts.Corpus(lambda: documents, of.splits, "made up"))


@pytest.mark.parametrize("name", MODELS)
def test_the_paper_s_tables_on_a_folder(name, made_up, cache, tmp_path, monkeypatch):
    folder = tmp_path / name
    build(MODELS[name]).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    suite = shrunk("paper", tmp_path, FEW if name.startswith("Llama") else FEW[:3])
    assert tiny.resting(monkeypatch, "run", str(suite), "--model", str(folder), "--output", str(tmp_path / "out")) == 0
    results = next((tmp_path / "out").glob("paper-*"))
    frame = pd.read_csv(results / "results.csv")
    assert frame.value.notna().all()
    assert {"teal, nominal", "spon(teal, nominal)", "teal", "spon(teal)", "spon(teal), c4"} <= set(frame.method)
    equal = frame[frame.method.isin(["teal", "spon(teal)"])]
    assert (equal.byte_sparsity - 0.5).abs().max() < 0.06  # few tokens and narrow layers
    lines = [line for line in (results / "README.md").read_text().split("\n") if "| spon(teal) " in line]
    beside = next(line for line in lines if "8B" in line or "Mistral" in line)
    cells = [cell.strip() for cell in beside.split("|")[1:-1]]
    figure = next(
        f
        for f in literature.tables()["spon-wikitext"].figures
        if is_counterpart(name, f.model) and f.method == "spon(teal)"
    )
    measured = frame[frame.metric == "wikitext2_perplexity"].set_index("method").value
    assert cells[:4] == [figure.model, "spon(teal)", "0.50", f"{figure.value:g}"]
    assert cells[4] == f"{measured['spon(teal, nominal)']:.4g}"
    assert cells[6] == f"{measured['spon(teal)']:.4g}"


def test_pruning_beside_what_was_published(made_up, cache, tmp_path, monkeypatch):
    folder = tiny.model_folder(tmp_path / "Llama-3.1-8B-Instruct")
    suite = shrunk("paper-pruning", tmp_path)
    arguments = ("pruning", str(suite), "--model", str(folder), "--output", str(tmp_path / "out"))
    assert tiny.resting(monkeypatch, "study", *arguments) == 0
    results = next((tmp_path / "out").glob("paper-pruning-*"))
    frame = pd.read_csv(results / "results.csv")
    assert {"magnitude", "wanda", "sparsegpt", "teal, nominal"} <= set(frame.method)
    text = (results / "README.md").read_text()
    by_name = {line.split("|")[2].strip(): line for line in text.split("\n") if "meta-llama" in line}
    own = frame[frame.method == "sparsegpt"].perplexity.iloc[0]
    assert "9.18" in by_name["sparsegpt"]
    assert f"{own:.4g}" in by_name["sparsegpt"]
    assert "10.1" in by_name["armor"]
    assert "not measured" in by_name["armor"]


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("dense", "dense"),
        ("teal", "teal, nominal"),
        ("spon(teal)", "spon(teal, nominal)"),
        ("spon(teal), c4", "spon(teal, nominal), c4"),
        ("wina-rotated", "wina-rotated, nominal"),
    ],
)
def test_labels_at_the_paper_s_thresholds(method, label):
    assert at_thresholds(method) == label


def test_every_published_figure_is_trusted_so_far_and_has_a_counterpart():
    for table in literature.tables().values():
        assert table.trust in literature.TRUST
        assert table.source
        assert table.about
        assert table.figures
        assert all(0.0 <= figure.sparsity < 1.0 and figure.value > 0 for figure in table.figures)
    assert is_counterpart("Qwen3-8B", "Qwen/Qwen3-8B")
    assert is_counterpart("Qwen/Qwen3-8B", "Qwen/Qwen3-8B")
    assert not is_counterpart("Qwen3-8B-Base", "Qwen/Qwen3-8B")
