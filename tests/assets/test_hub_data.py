"""Documents of a data set on the hub, which a folder stands in for."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import huggingface_hub
import pandas as pd
import pytest

from resting.benchmarks.documents import hub as hub_data
from resting.benchmarks.documents import spec
from resting.benchmarks.errors import AssetError
from resting.benchmarks.fitting import documents

CONFIGS = [
    {"config_name": "plain", "data_files": [{"split": "train", "path": "a-*"}, {"split": "test", "path": ["b-*"]}]},
]
TEXTS = ["the first", " ", "the second"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A data set of the files that lie in the folder; what is fetched is noted."""
    fetched = []

    class Api:
        def dataset_info(self, repository, revision=None):
            if repository != "some/data":
                raise OSError(f"there is no {repository}\nand more")
            names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
            found = [SimpleNamespace(rfilename=name) for name in names]
            return SimpleNamespace(sha="c" * 40, siblings=found, card_data={"configs": CONFIGS})

    def download(repository, name, repo_type, revision):
        fetched.append((repository, name, repo_type, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(folder=tmp_path, fetched=fetched)


def write(folder, name, column="text"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    rows = [{"id": i, column: text} for i, text in enumerate(TEXTS)]
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    elif name.endswith(".txt"):
        path.write_text("\n\n".join(TEXTS))
    else:
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (gzip.open if name.endswith(".gz") else open)(path, "wt").write(lines)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.txt"])
def test_every_kind_of_file_is_read(hub, name):
    write(hub.folder, name)
    found = hub_data.documents("some/data")
    assert str(found[0]) == f"hub:some/data@{'c' * 40}"  # with the commit: read again, it is the same
    assert found[1:] == (f"some/data@{'c' * 12}/{name}", ["the first", "the second"])
    assert hub.fetched == [("some/data", name, "dataset", "c" * 40)]


def test_training_text_comes_first(hub):
    for name in ("data/a-test.parquet", "data/train-1.parquet", "data/train-0.parquet", "README.md"):
        write(hub.folder, name)
    assert documents.read("some/data").name == f"some/data@{'c' * 12}/data/train-0.parquet"
    assert documents.read("some/data").held_out is None  # its last documents are kept off later


def test_a_column_is_named_after_a_colon(hub):
    write(hub.folder, "a.parquet", "prose")
    assert hub_data.documents("some/data:prose")[2] == ["the first", "the second"]
    with pytest.raises(AssetError, match=r"no field text or content or document or story; allowed .*: id, prose"):
        hub_data.documents("some/data")
    with pytest.raises(AssetError, match="no field 'x'; allowed after a colon: id, prose"):
        hub_data.documents("some/data:x")


def test_configuration_and_split_are_named(hub):
    for name in ("a-0.parquet", "b-0.parquet", "deep/valid-0.jsonl", "deep/test_1.jsonl"):
        write(hub.folder, name)
    names = {"plain:test:text": "b-0", "test:text": "b-0", "deep::text": "deep/test_1", "valid:text": "deep/valid-0"}
    for parts, file in names.items():
        assert hub_data.documents(f"hub:some/data:{parts}")[1].split(f"{'c' * 12}/")[1].startswith(file), parts
    with pytest.raises(AssetError, match="some/data has no configuration 'plian'; allowed: plain"):
        hub_data.documents("hub:some/data:plian:test:text")
    with pytest.raises(AssetError, match="has no split 'dev'; it has the files a-0"):
        hub_data.documents("hub:some/data:dev:text")
    with pytest.raises(AssetError, match="names no data set; allowed: hub:organisation/name"):
        hub_data.documents("hub:data")


@pytest.mark.parametrize(
    "text", ["hub:a/b", "hub:a/b:field", "hub:a/b:split:field", "hub:a/b@v1:c:s:f", "hub:a/b:c::f"]
)
def test_what_is_written_is_read_again(text):
    assert str(hub_data.parse(text)) == text
    assert spec.named(text) == ("b", text)


def test_without_the_hub_its_cache_is_read(hub, monkeypatch):
    folder = hub.folder / "snapshots" / ("d" * 40)
    folder.mkdir(parents=True)
    write(folder, "a.jsonl")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    data, _, found = hub_data.documents("hub:other/data")
    assert (data.revision, found) == ("d" * 40, ["the first", "the second"])


def test_what_is_not_there_is_one_sentence(hub):
    with pytest.raises(AssetError, match=r"^there is no text or file no/data, and of the hub: .* there is no no/data$"):
        documents.read("no/data")
    with pytest.raises(AssetError, match=r"some/data has no file that ends with \.parquet"):
        hub_data.documents("some/data")
    (hub.folder / "a.txt").write_text("  \n\n \n")
    with pytest.raises(AssetError, match=r"a\.txt of the data set some/data holds no text"):
        hub_data.documents("some/data")


def test_a_path_is_no_id(hub, monkeypatch):
    monkeypatch.chdir(hub.folder)
    write(hub.folder, "texts/mine.txt")
    assert not hub_data.is_id("texts/mine.txt")
    assert documents.read("texts/mine.txt").name == "mine.txt"
    assert not hub_data.is_id("../a")
    assert not hub_data.is_id("a/b/c")
