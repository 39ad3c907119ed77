"""Windows longer than a model's positions, and tokens without an embedding, are refused before anything is measured."""

from __future__ import annotations

import pytest
import tiny
import torch
from families import SMALL, build
from transformers import BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig

from resting.benchmarks.assets import models, texts
from resting.benchmarks.errors import ModelError
from resting.benchmarks.quality import limits

WINDOWS = {
    "evaluation.window": ("[evaluation]\n", "window = 16\nwindows = 3", "window = 65\nwindows = 3"),
    "calibration.window": ("[calibration]\n", "window = 16\nstat", "window = 65\nstat"),
    "calibration.matching_window": ("", "matching_window = 16", "matching_window = 65"),
}


@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["study", "shift"]])
@pytest.mark.parametrize("setting", WINDOWS)
def test_a_window_longer_than_the_positions_is_refused_first(tmp_path, monkeypatch, capsys, setting, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    tiny.provide_texts(monkeypatch)
    tiny.model_folder(tmp_path / "model")
    _, old, new = WINDOWS[setting]
    assert old in tiny.SUITE
    (tmp_path / "mine.toml").write_text(tiny.SUITE.replace(old, new, 1))
    monkeypatch.setattr(models.ModelSource, "load", lambda *_: pytest.fail("the model is loaded"))
    first, *options = command
    assert tiny.resting(monkeypatch, first, *options[:1], "mine.toml", *options[1:], "--model", "model") == 2
    said = capsys.readouterr()
    assert f"{setting} = 65: model has 64 positions; allowed: up to 64" in said.err + said.out


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(**SMALL), 64),
        (MistralConfig(**SMALL | {"sliding_window": 8}), 64),  # a window of attention is no limit
        (Gemma3TextConfig(**SMALL, head_dim=8), 64),
        (GPT2Config(n_positions=32), 32),
        (LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 256),
        (
            LlamaConfig(
                **SMALL,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 64,
                },
            ),
            256,
        ),
        (
            LlamaConfig(
                **SMALL | {"max_position_embeddings": 512},
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 64,
                },
            ),
            512,
        ),
    ],
)
def test_the_limit_is_the_models(config, limit):
    assert limits.positions(config) == limit


def test_a_model_without_a_limit_takes_every_window():
    assert limits.positions(BloomConfig()) is None


def test_a_token_without_an_embedding_is_named(tmp_path, monkeypatch, capsys):
    """One that the checks' own sample does not use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    tiny.provide_texts(monkeypatch)
    documents = [document.replace("w5", "more") for document in texts.CORPORA["wikipedia"].documents()]
    monkeypatch.setitem(texts.CORPORA, "wikipedia", texts.Corpus(lambda: documents, texts.SPLITS, "made up"))
    folder = tiny.model_folder(tmp_path / "model")
    tiny.tokenizer(known=[*tiny.WORDS, "a", "b", "c", "more", "more"]).save_pretrained(folder)
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "model") == 2
    said = "wikipedia has the token 'more' with the number 97; its model has embeddings of numbers below 97"
    assert said in capsys.readouterr().err


def test_ids_within_the_embedding_are_taken():
    limits.check_ids(torch.arange(97).tolist(), build("llama"), tiny.tokenizer(), "some text")
    with pytest.raises(ModelError, match="some text has the token None with the number 98"):
        limits.check_ids([3, 98], build("llama"), tiny.tokenizer(), "some text")
