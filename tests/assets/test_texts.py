"""Texts and their two splits."""

from __future__ import annotations

from resting.benchmarks.assets import texts


def test_the_mixed_text_is_fitted_on_what_no_text_is_measured_on(monkeypatch):
    """A side of it is that side of its parts: no document of its calibration is evaluated on anywhere."""
    parts = {name: [f"{name} {i}" for i in range(40)] for name in ("wikipedia", "papers", "stories")}
    for name, documents in parts.items():
        monkeypatch.setattr(texts, f"_{name}", lambda documents=documents: documents)
        known = texts.CORPORA[name]
        monkeypatch.setitem(
            texts.CORPORA, name, texts.Corpus(lambda documents=documents: documents, known.splits, known.about)
        )
    for split in texts.SPLITS:
        assert texts.documents("mixed", split) == [d for name in parts for d in texts.documents(name, split)]
    assert not set(texts.documents("mixed", "calibration")) & set(texts.documents("mixed", "evaluation"))
