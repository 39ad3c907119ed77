"""Methods that need a prompt: numbers under a policy that has one, and a reason under others."""

from __future__ import annotations

import pytest
import tiny

from resting.benchmarks.assets import models
from resting.benchmarks.cells import suite_file
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.measure import measure


def test_griffin_has_numbers_where_there_is_a_prompt_and_a_reason_elsewhere(monkeypatch, tmp_path, cache):
    tiny.provide_texts(monkeypatch)
    folder, path = tiny.model_folder(tmp_path / "model"), tmp_path / "mine.toml"
    policies = '[[policies]]\npolicy = "last-fraction"\nfraction = 0.5\ntargets = [0.3]\n'
    path.write_text(tiny.SUITE.replace("0.5", "0.3", 1).replace('"teal"', '"griffin"') + policies)
    loaded = LoadedModel(suite_file.load(str(path)), models.resolve(str(folder)), "cpu", lambda *_: None)
    found = {str(cell.policy): measure(loaded, cell, {}) for cell in cells_of(loaded.suite) if cell.label == "griffin"}
    nothing, half = found["all-but-first-1"], found["last-0.5"]
    assert (nothing.status, half.status) == ("skipped", "done")
    assert all("leaves none; allowed: decode-only" in row["reason"] and row["value"] is None for row in nothing.rows)
    assert all(row["value"] > 0 for row in half.rows)
    assert [row["byte_sparsity"] for row in half.rows] == pytest.approx([0.3] * len(half.rows), abs=0.01)


def test_what_cannot_be_folded_has_a_reason_there_and_its_other_numbers(monkeypatch, tmp_path, cache):
    tiny.provide_texts(monkeypatch)
    folder, path = tiny.model_folder(tmp_path / "model"), tmp_path / "mine.toml"
    suite = tiny.SUITE.replace("[evaluation]", "[evaluation]\nfolded = [0.5]\non_dense = [0.5]")
    path.write_text(suite.replace('"teal"', '"scap-channel"'))
    loaded = LoadedModel(suite_file.load(str(path)), models.resolve(str(folder)), "cpu", lambda *_: None)
    (cell,) = (cell for cell in cells_of(loaded.suite) if cell.label == "scap-channel")
    result = measure(loaded, cell, {})
    rows = {row["metric"].removeprefix("wikipedia_"): row for row in result.rows}
    assert result.status == "done"
    folded = rows.pop("perplexity_folded")
    assert folded["value"] is None
    assert "shifts the input at" in folded["reason"]
    assert set(rows) == {"perplexity", "kl", "perplexity_on_dense", "kl_on_dense"}
    assert all(row["value"] is not None and row["reason"] is None for row in rows.values())
