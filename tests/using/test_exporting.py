"""`resting export`: what plain transformers computes from the folder, and what its README says."""

from __future__ import annotations

import os
import stat

import pytest
import tiny
import torch
import using
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from resting.benchmarks.using import exporting
from resting.sparsifier import Decoder, Plan

COMMAND = ("export", "--plan", "plan", "-o", "out")


@pytest.fixture
def exported(room, monkeypatch, capsys):
    before = os.umask(0o022)
    try:
        assert tiny.resting(monkeypatch, *COMMAND) == 0
    finally:
        os.umask(before)
    return capsys.readouterr().out


def test_transformers_alone_computes_the_dense_model_with_biases(room, exported, ids):
    model, plan = using.model(room / "model"), using.plan()
    decoder = Decoder.of(model)
    biases = {site: rule.bias for site, rule in plan.rules.items() if rule.bias is not None}
    hooks = [
        decoder.linear(site).register_forward_hook(lambda m, args, y, bias=bias: y + bias)
        for site, bias in biases.items()
    ]
    loaded = AutoModelForCausalLM.from_pretrained(room / "out").eval()
    with torch.no_grad():
        wanted = model(ids).logits
        for hook in hooks:
            hook.remove()
        assert torch.allclose(loaded(ids).logits, wanted, atol=1e-5)
        assert not torch.allclose(model(ids).logits, wanted, atol=1e-3)
    words = "w1 w5 nothing"
    assert AutoTokenizer.from_pretrained(room / "out")(words).input_ids == tiny.tokenizer()(words).input_ids


def test_its_masks_are_those_of_the_plan(room, exported, ids):
    model, plan, masks = using.model(room / "model"), using.plan(), Plan.load(room / "out" / "masks")
    loaded = AutoModelForCausalLM.from_pretrained(room / "out").eval()
    with torch.no_grad(), masks.applied(loaded), plan.folded(model) as here, here.applied(model):
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_everyone_may_read_what_the_umask_allows(room, exported):
    for path in (room / "out", *(room / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_the_readme_is_a_model_card_that_says_what_is_left_out(room, exported):
    card = ModelCard.load(room / "out" / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    biases = sum(rule.bias is not None for rule in using.plan().rules.values())
    masks = len(using.plan().rules)
    assert f"a fitted plan's biases in {biases} of its layers" in card.text
    assert "**Without its masks this is the dense model with biases, and no faster:**" in card.text
    assert f"Not folded: {masks} masks; shifts of inputs: there are none" in card.text
    assert "| method | `mean-error(teal)` |" in card.text
    assert "| fitted: loss | 0.125 |" in card.text
    assert str(room) not in card.text
    assert f"Not in its weights: {masks} masks" in exported
    assert "wrote out/masks/plan.json\n" in exported


def test_what_the_readme_shows_runs(room, exported, monkeypatch, capsys):
    code = ModelCard.load(room / "out" / "README.md").text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(room / "out")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_exported_model_is_the_one_that_its_masks_name(room, exported, monkeypatch, capsys):
    command = ("generate", "--plan", "out/masks", "--prompt", using.PROMPT, "--max-new-tokens", "6")
    assert tiny.resting(monkeypatch, *command) == 0
    out, err = capsys.readouterr()
    assert ": out under mean-error(teal) at 0.5" in err
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained("out").eval(), tiny.tokenizer()
    with Plan.load("out/masks").applied(loaded):
        new = using.greedy(loaded, tokenizer(using.PROMPT).input_ids, 6)
    assert out.strip() == tokenizer.decode(new)


def test_it_is_overwritten_only_where_that_is_asked_for(room, exported, monkeypatch, capsys):
    (room / "out" / "README.md").write_text("mine")
    before = tiny.contents(room)
    assert tiny.resting(monkeypatch, *COMMAND) == 2
    assert "--output out exists; allowed: a new folder, or --overwrite" in capsys.readouterr().err
    assert tiny.contents(room) == before
    assert tiny.resting(monkeypatch, *COMMAND, "--overwrite") == 0
    assert (room / "out" / "README.md").read_text() != "mine"
    assert sorted(path.name for path in room.iterdir()) == ["model", "out", "plan"]


def test_an_empty_folder_may_be_filled(room, monkeypatch):
    (room / "out").mkdir()
    assert tiny.resting(monkeypatch, *COMMAND, "--dtype", "bfloat16") == 0
    assert AutoModelForCausalLM.from_pretrained(room / "out").dtype is torch.bfloat16


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bad generation config")])
def test_a_failure_leaves_nothing_half_written(room, monkeypatch, capsys, error):
    def fails(opened):
        raise error

    monkeypatch.setattr(exporting, "readme", fails)
    before = tiny.contents(room)
    with pytest.raises(type(error)) if isinstance(error, ValueError) else monkeypatch.context():
        assert tiny.resting(monkeypatch, *COMMAND) == 2
    assert tiny.contents(room) == before
    assert not (room / "out").exists()


def test_what_transformers_cannot_save_is_one_sentence(room, monkeypatch, capsys):
    def fails(plan, model, folder):
        raise ValueError("The generation config is invalid\nand more")

    monkeypatch.setattr(Plan, "export", fails)
    assert tiny.resting(monkeypatch, *COMMAND) == 2
    assert "model cannot be saved by transformers: The generation config is invalid" in capsys.readouterr().err
    assert sorted(path.name for path in room.iterdir()) == ["model", "plan"]
