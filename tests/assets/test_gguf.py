"""A GGUF becomes the model that llama.cpp would read in it, or is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import SMALL, build
from gguf_files import HEAD, expected, in_parts, logits, settings_of, tensors_of, write
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma3TextConfig, LlamaConfig

from resting.benchmarks import cache
from resting.benchmarks.assets import model_checks, models
from resting.benchmarks.errors import AssetError, BenchmarkError

Q8_0, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    assert cache.root() == tmp_path / "cache"


def loaded(path: Path) -> torch.Tensor:
    return logits(models.resolve(str(path)).load(torch.float32))


def llama(tmp_path: Path, settings: dict | None = None, tensors: dict | None = None, **others) -> Path:
    return write(
        tmp_path / "some.gguf", tensors_of("llama") | (tensors or {}), settings_of("llama") | (settings or {}), **others
    )


def test_a_file_gives_the_logits_of_its_tensors(tmp_path):
    kinds = {"blk.0.ffn_up.weight": Q8_0, "blk.1.attn_q.weight": Q8_0, "blk.2.attn_k.weight": F16}
    path = llama(tmp_path, kinds=kinds)
    torch.testing.assert_close(loaded(path), expected(path))


def test_the_oracle_is_the_model_that_was_written(tmp_path):
    torch.testing.assert_close(expected(llama(tmp_path)), logits(build("llama")))


def _gemma(family: str) -> torch.nn.Module:
    """A model whose attention is scaled as llama.cpp does, which a file does not say."""
    sizes = SMALL | {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 16}
    torch.manual_seed(0)
    kind = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}[family]
    model = AutoModelForCausalLM.from_config(kind(**sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_other_families_give_the_logits_of_the_model_that_was_written(tmp_path, family):
    settings = settings_of(family) | {f"{family}.attention.key_length": HEAD, f"{family}.attention.value_length": HEAD}
    model = _gemma(family) if family.startswith("gemma") else build(family)
    if family.startswith("gemma"):
        settings[f"{family}.attention.sliding_window"] = 16
    if family == "gemma2":
        settings |= {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
    if family == "gemma3":
        settings["gemma3.rope.freq_base"] = 1e6
    path = write(tmp_path / "some.gguf", tensors_of(family, model), settings, family)
    torch.testing.assert_close(loaded(path), logits(model))


@pytest.mark.parametrize("named", [0, 1])
def test_a_split_file_is_read_from_all_its_parts(tmp_path, named):
    path = llama(tmp_path, kinds={"blk.0.ffn_up.weight": Q8_0})
    right = expected(path)
    parts = in_parts(path, 2)
    source = models.resolve(str(parts[named]))
    assert source.name == "some (quantised, dequantised)"
    assert source.sha256 == models.resolve(str(parts[1 - named])).sha256
    torch.testing.assert_close(logits(source.load(torch.float32)), right)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_split_file_without_a_part_is_refused(tmp_path, lost):
    parts = in_parts(llama(tmp_path), 2)
    parts[lost].unlink()
    with pytest.raises(AssetError, match=f"is one of 2 parts, and {parts[lost].name} is not there"):
        models.resolve(str(parts[1 - lost]))


def test_a_part_under_another_name_is_refused(tmp_path):
    parts = in_parts(llama(tmp_path), 2)
    parts[0].rename(tmp_path / "whole.gguf")
    with pytest.raises(AssetError, match="it says that it has 2 parts, and its name says 1"):
        models.resolve(str(tmp_path / "whole.gguf"))


def test_parts_of_two_files_are_refused(tmp_path):
    parts = in_parts(llama(tmp_path), 2)
    shutil.copy(parts[0], parts[1])
    with pytest.raises(AssetError, match=f"{parts[1].name} says it is part 0 of 2"):
        models.resolve(str(parts[0]))


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight", "token_embd.weight"])
def test_a_tensor_that_is_missing_is_named(tmp_path, name):
    tensors = tensors_of("llama")
    del tensors[name]
    path = write(tmp_path / "some.gguf", tensors, settings_of("llama"))
    with pytest.raises(AssetError, match=f"cannot be dequantised: it lacks the tensor {name}"):
        models.resolve(str(path))
    assert not list((tmp_path / "cache" / "models").glob("[!.]*[!k]"))  # nothing is sealed


@pytest.mark.parametrize(
    "name", ["blk.1.attn_q.bias", "blk.0.ffn_down.scale", "blk.0.attn_q_norm.weight", "some.weight"]
)
def test_a_tensor_that_nothing_takes_is_named(tmp_path, name):
    with pytest.raises(AssetError, match=f"it has the tensor {name}, which a llama model does not take"):
        models.resolve(str(llama(tmp_path, tensors={name: np.ones(32, np.float32)})))


def test_linear_scaling_of_the_metadata_is_applied(tmp_path):
    path = llama(tmp_path, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    right = logits(_scaled({"rope_type": "linear", "factor": 4.0}))
    torch.testing.assert_close(expected(path), right)
    torch.testing.assert_close(loaded(path), right)


def test_yarn_of_the_metadata_is_applied(tmp_path):
    settings = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    path = llama(tmp_path, {f"llama.rope.scaling.{key}": value for key, value in settings.items()})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    torch.testing.assert_close(loaded(path), logits(_scaled(yarn)))


def test_the_factors_of_llama_3_are_applied(tmp_path):
    """As in every GGUF of Llama 3.1 to 3.3; 8 and 8192 are what 3.1 has."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = _scaled(rope | {"original_max_position_embeddings": 8192})
    plain = 1 / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors[-1] != 1
    path = llama(tmp_path, tensors={"rope_freqs.weight": factors.astype(np.float32)})
    torch.testing.assert_close(loaded(path), logits(model))
    torch.testing.assert_close(loaded(path), expected(path))


def test_factors_of_one_are_none(tmp_path):
    path = llama(tmp_path, tensors={"rope_freqs.weight": np.ones(HEAD // 2, np.float32)})
    torch.testing.assert_close(loaded(path), logits(build("llama")))


def test_factors_of_no_known_scaling_are_refused(tmp_path):
    with pytest.raises(AssetError, match=r"its tensor rope_freqs\.weight is of no known scaling"):
        models.resolve(str(llama(tmp_path, tensors={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})))


def _scaled(rope: dict) -> torch.nn.Module:

    plain = build("llama")
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL, rope_parameters=rope | {"rope_theta": 10000.0})
    ).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize(
    ("setting", "found", "said"),
    [
        ("rope.scaling.type", "longrope", "allowed: none, linear, yarn"),
        ("attention.sliding_window", 8, "the model would be given None"),
        ("attn_logit_softcapping", 50.0, "the model would be given None"),
        ("logit_scale", 0.5, "the model would be given 1.0"),
        ("attention.scale", 0.5, r"the model would be given 0\.35"),
        ("attention.key_length", 16, "shape"),
        ("rope.dimension_count", 4, "the model would be given 8"),
        ("expert_count", 8, "the model would be given 0"),
        ("something.new", 3, "which cannot be applied"),
        ("embedding_length", 64, "cannot be dequantised"),
    ],
)
def test_a_setting_that_is_not_applied_is_named(tmp_path, setting, found, said):
    settings = {f"llama.{setting}": found}
    if setting == "rope.scaling.type":
        settings["llama.rope.scaling.factor"] = 2.0
    with pytest.raises(AssetError, match=said) as caught:
        models.resolve(str(llama(tmp_path, settings)))
    assert setting in str(caught.value) or said in ("shape", "cannot be dequantised")


@pytest.mark.parametrize("lost", ["attention.layer_norm_rms_epsilon", "context_length", "block_count"])
def test_a_setting_that_is_missing_is_not_made_up(tmp_path, lost):
    settings = settings_of("llama")
    del settings[f"llama.{lost}"]
    with pytest.raises(AssetError, match="cannot be dequantised"):
        models.resolve(str(write(tmp_path / "some.gguf", tensors_of("llama"), settings)))


@pytest.mark.parametrize("name", ["some.GGUF", "Some.Gguf"])
def test_the_suffix_is_known_in_any_case(tmp_path, name):
    path = llama(tmp_path).rename(tmp_path / name)
    assert models.resolve(str(path)).name == f"{path.stem} (quantised, dequantised)"


def test_what_older_code_converted_is_converted_again(tmp_path, monkeypatch):
    path = llama(tmp_path)
    source = models.resolve(str(path))
    monkeypatch.setattr(model_checks, "CONVERSION", 1)
    model_checks.seal(source.folder, {"name": "old", "gguf": path.name})
    monkeypatch.undo()
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    assert models.resolve(str(path)) == source


def test_an_architecture_that_nobody_compared_is_refused(tmp_path):
    path = write(tmp_path / "some.gguf", tensors_of("llama"), settings_of("stablelm"), "stablelm")
    with pytest.raises(BenchmarkError, match="architecture is 'stablelm'; allowed: llama, qwen2, qwen3, gem"):
        models.resolve(str(path))


@pytest.mark.parametrize("added", [True, False])
def test_texts_begin_as_the_file_says(tmp_path, added):
    path = llama(tmp_path, more={"tokenizer.ggml.add_bos_token": added})
    assert models.resolve(str(path)).tokenizer()("ab").input_ids[:-1] == [1] * added


@pytest.mark.parametrize(("name", "wanted"), [("bos", True), ("bos", False), ("eos", True)])
def test_a_tokenizer_that_does_not_follow_the_file_is_refused(tmp_path, monkeypatch, name, wanted):
    """As transformers 5.17 does with a Gemma: it leaves the BOS token out."""
    made = AutoTokenizer.from_pretrained

    def other(*args, **kwargs):
        tokenizer = made(*args, **kwargs)
        setattr(tokenizer, f"add_{name}_token", not wanted)
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", other)
    path = llama(tmp_path, more={f"tokenizer.ggml.add_{name}_token": wanted})
    with pytest.raises(AssetError, match=f"add_{name}_token is {wanted}"):
        models.resolve(str(path))
