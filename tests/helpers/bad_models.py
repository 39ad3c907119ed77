"""Models that cannot be used, as arguments of ``--model``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, T5Config, T5Model

RUN = ["run", "mine.toml", "--model"]
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def named(spec: str) -> Callable[[Path], list[str]]:
    return lambda folder: [*RUN, spec]


def changed(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """The good model, after `change`."""

    def act(folder: Path) -> list[str]:
        change(folder / "model")
        return [*RUN, "model"]

    return act


def config(**values: Any) -> Callable[[Path], list[str]]:
    def change(model: Path) -> None:
        known = json.loads((model / "config.json").read_text())
        known = {key: value for key, value in (known | values).items() if value is not None}
        (model / "config.json").write_text(json.dumps(known))

    return changed(change)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], list[str]]:
    def act(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return changed(act)


def written(name: str, data: bytes) -> Callable[[Path], list[str]]:
    return changed(lambda model: (model / name).write_bytes(data))


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def another(make: Callable[[], Any]) -> Callable[[Path], list[str]]:
    """A model of another kind in its place."""

    def change(model: Path) -> None:
        shutil.rmtree(model)
        make().save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)

    return changed(change)


def gguf_file(keep: float) -> Callable[[Path], list[str]]:
    """A GGUF of which only a share is there."""

    def act(folder: Path) -> list[str]:
        path = folder / "some.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_tensor("token_embd.weight", np.ones((97, 32), np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        return [*RUN, "some.gguf"]

    return act


def gguf_of(data: bytes) -> Callable[[Path], list[str]]:
    def act(folder: Path) -> list[str]:
        (folder / "some.gguf").write_bytes(data)
        return [*RUN, "some.gguf"]

    return act


def empty(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return [*RUN, "empty"]


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name][:1].fill_(value)


DOWN = "model.layers.1.mlp.down_proj.weight"
MODELS = {
    "no name": (named(""), "--model '' names none; allowed: a folder, a .gguf file, organisation/name"),
    "a name that is none": (named("nothing"), "no model 'nothing': it is neither 'smollm2-135m', nor a folder"),
    "a name of a dry run": (lambda f: [*RUN, "nothing", "--dry-run"], "no model 'nothing': it is neither"),
    "a folder that is not there": (named("./nothing"), "no model './nothing': it is neither"),
    "a folder of nobody's": (named("~nobody-here/model"), "no model '~nobody-here/model': it is neither"),
    "an id that is not on the hub": (named("someone/something"), "the hub model 'someone/something' cannot be had: "),
    "an id that is none": (named("some one/some thing"), "the hub model 'some one/some thing' cannot be had: "),
    "a file": (named("mine.toml"), "no model 'mine.toml': it is neither"),
    "an empty folder": (empty, "empty is no model folder: it needs config.json and *.safetensors files"),
    "no weights": (changed(lambda m: (m / "model.safetensors").unlink()), "model is no model folder: it needs"),
    "no configuration": (changed(lambda m: (m / "config.json").unlink()), "model is no model folder: it needs"),
    "a configuration that is no JSON": (written("config.json", b"{"), "model/config.json is not JSON"),
    "a configuration that is no text": (written("config.json", b"\xff\xfe"), "model/config.json is not JSON"),
    "a configuration that is a list": (
        written("config.json", b"[]"),
        "model/config.json holds a list; allowed: a JSON",
    ),
    "no type": (
        config(model_type=None, architectures=None),
        "model/config.json describes no known model: Unrecognized model",
    ),
    "an unknown type": (
        config(model_type="klingon"),
        "model/config.json describes no known model: The checkpoint you are",
    ),
    "an unknown type in a dry run": (
        lambda f: [*config(model_type="klingon")(f), "--dry-run"],
        "model/config.json describes no known model: The checkpoint you are",
    ),
    "a size that is text": (config(hidden_size="big"), "model/config.json describes no known model: "),
    "no heads": (config(num_attention_heads=0), "model/config.json describes no known model: "),
    "more layers than weights": (config(num_hidden_layers=4), "model lacks the weights model.layers.3."),
    "another width": (config(intermediate_size=64), "the model in model cannot be loaded: "),
    "a weight that is missing": (weights(lambda t: t.pop(DOWN)), f"model lacks the weights {DOWN}; allowed: all that"),
    "a weight of NaN": (
        weights(fill(DOWN, float("nan"))),
        f"model has NaN or infinite weights in {DOWN}; allowed: fin",
    ),
    "an infinite weight": (
        weights(fill("model.embed_tokens.weight", float("inf"))),
        "infinite weights in model.embed_",
    ),
    "truncated weights": (changed(cut), "model/model.safetensors is cut short, or longer than it says; allowed: "),
    "weights that are text": (
        written("model.safetensors", b"<html>not found</html>"),
        "model/model.safetensors is no safetensors file: ",
    ),
    "no bytes of weights": (written("model.safetensors", b""), "model/model.safetensors is no safetensors file: "),
    "an index of shards that are missing": (
        changed(
            lambda m: (
                (m / "model.safetensors").rename(m / "model-00001-of-00002.safetensors"),
                (m / "model.safetensors.index.json").write_text(
                    json.dumps({"metadata": {}, "weight_map": {DOWN: "model-00002-of-00002.safetensors"}})
                ),
            )
        ),
        "model.safetensors.index.json names model-00002-of-00002.safetensors, which is not in model",
    ),
    "no tokenizer": (
        changed(lambda m: [file.unlink() for file in m.glob("tokenizer*")]),
        "model has no tokenizer that can be loaded: ",
    ),
    "a tokenizer that is no JSON": (written("tokenizer.json", b"{"), "model has no tokenizer that can be loaded: "),
    "a tokenizer of another model": (
        changed(lambda m: tiny.tokenizer(300).save_pretrained(m)),
        "model has a tokenizer that gives token 299; its model knows tokens below 97",
    ),
    "an encoder": (another(lambda: BertModel(BertConfig(**SMALL))), "model is no model that inputs can rest in: Bert"),
    "an encoder with a decoder": (
        another(lambda: T5Model(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))),
        "the model in model cannot be loaded: Unrecognized configuration class",
    ),
    "code of its own": (
        config(auto_map={"AutoModelForCausalLM": "x.Y"}),
        "model brings code of its own (config.json has auto_map), which is never run unless --trust-remote-code is",
    ),
    "no GGUF file": (named("nothing.gguf"), "there is no GGUF file nothing.gguf"),
    "an empty GGUF": (gguf_of(b""), "some.gguf cannot be dequantised: "),
    "a GGUF that is text": (
        gguf_of(b"<html>not found</html>" * 9),
        "some.gguf cannot be dequantised: ",
    ),
    "a GGUF of nothing but its magic": (gguf_of(b"GGUF"), "some.gguf cannot be dequantised: "),
    "a truncated GGUF": (gguf_file(0.5), "some.gguf cannot be dequantised: "),
    "a GGUF of half a model": (gguf_file(1.0), "some.gguf cannot be dequantised: "),
}
