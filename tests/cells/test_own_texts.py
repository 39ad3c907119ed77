"""Texts of the user's own in suites: how they are named, divided, told apart and refused."""

from __future__ import annotations

import hashlib
import json
import shutil

import pandas as pd
import pytest
import tiny

from resting.benchmarks.assets import models, texts
from resting.benchmarks.cells import expand, identity, own_texts, suite_file
from resting.benchmarks.errors import AssetError, SuiteError
from resting.benchmarks.sweep import available

DOCUMENTS = [f"document {i}: " + " ".join(f"w{(i * 7 + j) % 90}" for j in range(30)) for i in range(24)]


@pytest.fixture
def here(cache, tmp_path, monkeypatch):
    """A folder with a text in every form."""
    monkeypatch.chdir(tmp_path)
    tiny.provide_texts(monkeypatch)
    (tmp_path / "mine.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    rows = [{"id": i, "prose": text} for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "table.parquet")
    return tmp_path


def suite(folder, measured='["wikipedia"]', fitted=None, more=""):
    text = tiny.SUITE.replace('["wikipedia"]', measured).replace('title = "Mine"', f'title = "Mine"\n{more}')
    if fitted:
        text = text.replace("[calibration]", f"[calibration]\ntext = {json.dumps(fitted)}")
    (folder / "suite.toml").write_text(text, encoding="utf-8")
    return suite_file.load(str(folder / "suite.toml"))


def of(found, name, split):
    return texts.documents(name, split, found.own(name))


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("mine.txt", "mine"),
        ("lines.jsonl:prose", "lines"),
        ("list.json:prose", "list"),
        ("table.parquet:prose", "table"),
        ("other-name=mine.txt", "other-name"),
        ("текст=mine.txt", "текст"),
    ],
)
def test_every_kind_of_file_gives_the_same_documents_under_a_name(here, written, name):
    found = own_texts.resolved(suite(here, json.dumps([written])))
    assert found.evaluation.texts == [name]
    assert of(found, name, "evaluation") == DOCUMENTS
    assert found.sources[name].sha256 == hashlib.sha256(json.dumps(DOCUMENTS).encode()).hexdigest()


def test_a_file_with_a_name_in_another_script_is_called_by_it(here):
    shutil.copy(here / "mine.txt", here / "Übung 1.txt")
    assert suite(here, '["Übung 1.txt"]').evaluation.texts == ["Übung-1"]


def test_paths_are_seen_from_the_suite_and_not_from_where_the_command_runs(here, monkeypatch):
    (here / "elsewhere").mkdir()
    found = suite(here, '["mine.txt"]')
    monkeypatch.chdir(here / "elsewhere")
    assert of(own_texts.resolved(found), "mine", "evaluation") == DOCUMENTS


def test_one_text_for_both_is_divided_by_document(here):
    found = own_texts.resolved(suite(here, '["mine.txt"]', "mine.txt"))
    fitted, measured = of(found, "mine", "calibration"), of(found, "mine", "evaluation")
    assert not set(fitted) & set(measured)
    assert sorted(fitted + measured) == sorted(DOCUMENTS)
    assert fitted
    assert measured


def test_a_text_that_cannot_be_divided_is_refused(here):
    (here / "one.txt").write_text(" ".join(DOCUMENTS))
    found = own_texts.resolved(suite(here, '["one.txt"]', "one.txt"))
    with pytest.raises(AssetError, match=r"one is to be both fitted and measured on, .* \(1\) all fall on one side"):
        of(found, "one", "evaluation")


def test_what_is_fitted_on_is_not_measured_on_under_another_name(here):
    shutil.copy(here / "mine.txt", here / "copy.txt")
    with pytest.raises(AssetError, match="a document of the text copy, which is measured on, stands in mine"):
        own_texts.resolved(suite(here, '["copy.txt"]', "mine.txt"))
    (here / "mine.txt").write_text(" ".join(DOCUMENTS[0:12]) + "\n" + "\n".join(DOCUMENTS[12:]))  # cut elsewhere
    with pytest.raises(AssetError, match=r"\d+% of the text copy|a document of the text copy"):
        own_texts.resolved(suite(here, '["copy.txt"]', "mine.txt"))


def keys(folder, found):
    source = models.resolve(str(folder))
    setting = identity.run_setting(found, source, "cpu", ())
    return [identity.cell_key(cell, setting) for cell in expand.cells_of(found)]


def test_keys_change_with_what_a_text_says_and_with_nothing_else(here):
    folder = tiny.model_folder(here / "model")
    before = keys(folder, own_texts.resolved(suite(here, '["mine.txt"]')))
    (here / "deep").mkdir()
    shutil.move(here / "mine.txt", here / "deep" / "mine.txt")
    assert keys(folder, own_texts.resolved(suite(here, '["deep/mine.txt"]'))) == before  # another path
    assert keys(folder, own_texts.resolved(suite(here, '["mine=lines.jsonl:prose"]'))) == before  # another file
    (here / "deep" / "mine.txt").write_text("\n\n".join([*DOCUMENTS[:-1], DOCUMENTS[-1] + "!"]))
    after = keys(folder, own_texts.resolved(suite(here, '["deep/mine.txt"]')))
    assert not set(after) & set(before)


def test_a_fit_does_not_depend_on_a_text_that_is_only_measured_on(here):
    source = models.resolve(str(tiny.model_folder(here / "model")))
    plain, more = suite(here), own_texts.resolved(suite(here, '["wikipedia", "mine.txt"]'))
    assert identity.fit_setting(plain, source, "cpu") == identity.fit_setting(more, source, "cpu")
    fitted = own_texts.resolved(suite(here, fitted="mine.txt"))
    assert identity.fit_setting(plain, source, "cpu") != identity.fit_setting(fitted, source, "cpu")


def test_a_suite_whose_texts_were_not_read_has_no_keys(here):
    with pytest.raises(SuiteError, match="the text mine of suite mine has not been read"):
        keys(tiny.model_folder(here / "model"), suite(here, '["mine.txt"]'))


NAMES = {
    '["wikipedia=mine.txt"]': "'wikipedia' is called like a text that the suite knows",
    '["Wikipedia=mine.txt"]': "'Wikipedia' is called like a text that the suite knows, wikipedia",
    '["mine.txt", "deep/mine.txt"]': "two texts are called 'mine', mine.txt and deep/mine.txt",
    '["a=mine.txt", "A=list.json:prose"]': "'A' is called like another text, a",
    '["a/b=mine.txt"]': "'a/b' cannot be the name of a text",
    '["=mine.txt"]': "'' cannot be the name of a text",
    '["a="]': "text 'a=' names no file",
    '["wikipaedia"]': r"'wikipaedia' is no known text \(did you mean 'wikipedia'\?\); allowed: wikitext2, .*mine.txt",
    '["mine.txt", "mine.txt"]': "evaluation.texts: mine stands there twice",
    '["hub:some"]': "'hub:some' names no data set",
}


@pytest.mark.parametrize("written", NAMES)
def test_names_that_rows_could_not_tell_apart_are_refused(here, written):
    with pytest.raises(SuiteError, match=NAMES[written]):
        suite(here, written)


def test_a_text_is_not_called_like_a_task(here):
    with pytest.raises(SuiteError, match="'piqa' is called like a task of the suite"):
        suite(here, '["piqa=mine.txt"]', more='tasks = { names = ["piqa"] }')


FILES = {
    "no.txt": (None, "the text file .*no.txt cannot be read: No such file"),
    "empty.txt": (b" \n\n ", "empty.txt holds no text"),
    "latin.txt": ("Übung".encode("latin-1"), "latin.txt cannot be read: it is not UTF-8 text"),
    "a.jsonl:x": (b'{"text": "a"}', "row 1 of a.jsonl has no field 'x'; allowed after a colon: text"),
    "b.jsonl": (b'{"prose": "a"}', "row 1 of b.jsonl has no field text or content"),
    "c.jsonl:x": (b'{"x": "a"}\n{"x": 3}', "field 'x' in row 2 of c.jsonl holds int; allowed: text"),
    "d.jsonl:x": (b'{"x": "a"}\nno', "line 2 of d.jsonl is not JSON"),
    "e.json:x": (b"[1]", "row 1 of e.json is no object with fields"),
    "f.parquet:x": (b"PAR1", "f.parquet is not a Parquet file"),
    "g.jsonl:x": (rb'{"x": "\ud800"}', "g.jsonl holds half of a surrogate pair"),
    "h.jsonl.gz:x": (b"\x1f\x8b\x08 broken", "h.jsonl.gz cannot be read"),
}


@pytest.mark.parametrize("written", FILES)
def test_a_file_that_is_no_text_is_refused_in_one_sentence(here, written):
    content, said = FILES[written]
    if content is not None:
        (here / written.split(":")[0]).write_bytes(content)
    with pytest.raises(AssetError, match=said) as found:
        own_texts.resolved(suite(here, json.dumps([written])))
    assert "\n" not in str(found.value)


def test_too_little_text_is_refused_before_anything_is_measured(here):
    (here / "short.txt").write_text("w1 w2 w3")
    source = models.resolve(str(tiny.model_folder(here / "model")))
    for found in (suite(here, '["short.txt"]'), suite(here, fitted="short.txt")):
        with pytest.raises(AssetError, match=r"short has 3 tokens for .*, and one window takes 16; allowed: more text"):
            available.check_lengths(own_texts.resolved(found), source)


def test_a_copy_is_found_by_its_hash_and_another_text_is_not_taken_for_it(here):
    found = own_texts.resolved(suite(here, '["mine.txt"]'))
    (here / "mine.txt").write_text("something else")
    assert own_texts.resolved(found) == found  # as verify reads it from provenance.json
    shutil.rmtree(here / "cache" / "texts")
    with pytest.raises(AssetError, match="is not the text mine: its documents have sha256"):
        own_texts.resolved(found)
    (here / "mine.txt").unlink()
    with pytest.raises(
        AssetError, match=r"the text mine \(sha256 .*\) has no copy on this machine, .* --text mine=FILE"
    ):
        own_texts.resolved(found)
    assert (
        own_texts.resolved(found, {"mine": "lines.jsonl:prose"}).sources["mine"].sha256 == found.sources["mine"].sha256
    )
    with pytest.raises(AssetError, match="suite mine has no text 'mien'; allowed: wikitext2, mine"):
        own_texts.resolved(found, {"mien": "lines.jsonl:prose"})
    with pytest.raises(AssetError, match="--text papers=FILE: papers comes with a package"):
        own_texts.resolved(found, {"papers": "lines.jsonl:prose"})
