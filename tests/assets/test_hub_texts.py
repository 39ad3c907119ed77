"""Texts from the hub, with the hub replaced by a folder."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from resting.benchmarks.assets import hub_texts, texts
from resting.benchmarks.errors import AssetError

KNOWN = {
    "alpaca": ("tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "text", 300),
    "refinedweb": ("tiiuae/falcon-refinedweb", "data/train-00000-of-05534-b8fc5348cbe605a5.parquet", "content", 2000),
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "text", 4000),
    "wikitext2-train": ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", "text", 4000),
}
DOCUMENTS = ["first\nline", " \n", "zweites, mit Ümläuten", "", "first\nline", "the last one read", "one too many"]


def write(file: Path, column: str, documents: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(".json.gz"):
        lines = [json.dumps({column: d, "url": f"u{i}"}, ensure_ascii=False) for i, d in enumerate(documents)]
        file.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
        return
    other = [f"u{i}" for i in range(len(documents))]
    pyarrow.parquet.write_table(pa.table({"url": other, column: documents}), file, row_group_size=2)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Data sets in folders; what is asked for is matched as the hub does."""
    asked = []

    def snapshot_download(repository, *, repo_type, revision, allow_patterns, local_files_only=False):
        assert re.fullmatch("[0-9a-f]{40}", revision)  # a commit: no later one changes what is read
        asked.append((repository, repo_type, local_files_only))
        folder = tmp_path / repository
        if not folder.exists():
            raise FileNotFoundError(f"{repository} is not there")
        for file in [f for f in folder.rglob("*") if f.is_file()]:
            if not any(fnmatch(file.relative_to(folder).as_posix(), p) for p in allow_patterns):
                file.unlink()
        return str(folder)

    def keep(name, documents=DOCUMENTS, count=6, column=None):
        repository, file, own, _ = KNOWN[name]
        monkeypatch.setitem(hub_texts.TEXTS, name, replace(hub_texts.TEXTS[name], count=count))
        write(tmp_path / repository / file, column or own, documents)
        return tmp_path / repository

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    keep.asked = asked
    return keep


def test_the_published_texts_are_known():
    assert {n: (t.repository, t.column, t.count) for n, t in hub_texts.TEXTS.items()} == {
        name: (repository, column, count) for name, (repository, _, column, count) in KNOWN.items()
    }
    assert set(KNOWN) <= set(texts.CORPORA)


@pytest.mark.parametrize("name", KNOWN)
def test_documents(hub, name):
    """The first six rows, without the blank ones among them."""
    hub(name)
    assert hub_texts.documents(name) == [DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[4], DOCUMENTS[5]]
    assert hub.asked == [(KNOWN[name][0], "dataset", False)]


@pytest.mark.parametrize("name", KNOWN)
def test_only_the_first_file_is_read(hub, name):
    folder = hub(name)
    _, file, column, _ = KNOWN[name]
    for other in (file.replace("00000-of", "00001-of"), file.replace("train", "test"), f"old/{file}"):
        write(folder / other, column, ["another"])
    assert "another" not in hub_texts.documents(name)


@pytest.mark.parametrize("name", KNOWN)
def test_as_a_corpus(hub, name):
    hub(name)
    assert texts.documents(name, "calibration") == [DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[5]]  # each once
    with pytest.raises(AssetError, match=f"{name} is for calibration only"):
        texts.documents(name, "evaluation")


@pytest.mark.parametrize("name", KNOWN)
def test_without_a_hub(monkeypatch, name):
    def unreachable(*args, **kwargs):
        raise ConnectionError("\nno route to huggingface.co\nTraceback of something\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(AssetError) as error:
        hub_texts.documents(name)
    expected = f"{name} ({KNOWN[name][0]} on the hub) cannot be had: no route to huggingface.co"
    assert str(error.value) == expected
    assert not texts.is_cached(name)


def test_an_error_without_a_message_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(AssetError, match=r"cannot be had: TimeoutError$"):
        hub_texts.documents("c4")


@pytest.mark.parametrize("name", KNOWN)
def test_is_cached(hub, name):
    assert not texts.is_cached(name)
    folder = hub(name)
    assert texts.is_cached(name)
    assert {local for _, _, local in hub.asked} == {True}  # nothing is downloaded to find out
    (folder / KNOWN[name][1]).unlink()
    assert not texts.is_cached(name)


@pytest.mark.parametrize("name", KNOWN)
def test_a_file_of_another_kind(hub, name):
    folder = hub(name, column="body")
    with pytest.raises(AssetError, match=f"^{name} .*cannot be had: .*"):
        hub_texts.documents(name)
    (folder / KNOWN[name][1]).write_bytes(b"<html>not what it was</html>")
    with pytest.raises(AssetError, match=f"^{name} .*cannot be had: "):
        hub_texts.documents(name)


@pytest.mark.parametrize("name", KNOWN)
def test_no_text_at_all(hub, name):
    hub(name, documents=["", " ", "\n"])
    with pytest.raises(AssetError, match=f"^{name}: .* holds no text in column '{KNOWN[name][2]}'"):
        hub_texts.documents(name)


@pytest.mark.parametrize("name", KNOWN)
def test_a_data_set_without_the_file_is_told_so(hub, name):
    (hub(name) / KNOWN[name][1]).unlink()
    with pytest.raises(AssetError, match=f"^{name} ") as error:
        hub_texts.documents(name)
    assert "index out of range" not in str(error.value)


@pytest.mark.parametrize("name", KNOWN)
def test_a_missing_value_is_no_document(hub, name):
    hub(name, documents=["one", None, "two"])
    assert hub_texts.documents(name) == ["one", "two"]
