"""What windows and prompts begin with, and windows that overlap as TEAL's do."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from families import build
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from resting.benchmarks.assets import texts
from resting.benchmarks.cells import identity, suite_file
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.quality import bos, perplexity
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.tasks.likelihood import Scorer
from resting.benchmarks.quality.tasks.lm import PackedLM
from resting.benchmarks.quality.windows import windows_of
from resting.sparsifier import LastFraction, Plan, fingerprint

BOS, OTHER = 1, 2


def tokenizer(*before: str, has_bos: bool = True):
    """Words, with the tokens `before` put before every text."""
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "w0"} if has_bos else {})
    if before:
        ids = [(token, made.convert_tokens_to_ids(token)) for token in before]
        made._tokenizer.post_processor = TemplateProcessing(single=f"{' '.join(before)} $A", special_tokens=ids)
    return made


@pytest.mark.parametrize(
    ("before", "setting", "expected"),
    [
        ((), "auto", []),  # a Gemma whose tokenizer lost its setting
        ((), "always", ["w0"]),
        ((), "never", []),
        (("w0",), "auto", ["w0"]),
        (("w0",), "always", ["w0"]),
        (("w0",), "never", []),
        (("w5", "w6"), "auto", ["w5", "w6"]),  # of GLM: two tokens, none of which is its BOS
    ],
)
def test_windows_begin_as_asked(monkeypatch, before, setting, expected):
    tiny.provide_texts(monkeypatch)
    made = tokenizer(*before)
    begin = made.convert_tokens_to_ids(expected)
    plain = made(" ".join(texts.documents("wikipedia", "evaluation")), add_special_tokens=False).input_ids
    found = windows_of("wikipedia", "evaluation", made, 16, None, bos=setting).ids
    body = 16 - len(begin)
    for number, window in enumerate(found.tolist()):
        assert window == begin + plain[number * body : (number + 1) * body]
    assert len(found) == len(plain) // body
    assert bos.shown(made, setting) == expected


def test_a_bos_token_that_is_not_there_is_refused():
    made = tokenizer(has_bos=False)
    with pytest.raises(SuiteError, match='bos = "always": the tokenizer has no BOS token; allowed: "auto" and "never"'):
        bos.beginning(made, "always")


@pytest.mark.parametrize("setting", ["auto", "always", "never"])
def test_calibration_and_prompts_begin_as_windows_do(monkeypatch, tmp_path, setting):
    tiny.provide_texts(monkeypatch)
    folder = tiny.model_folder(tmp_path / "model")
    made = tokenizer()
    made.save_pretrained(folder)
    path = tmp_path / "mine.toml"
    path.write_text(tiny.SUITE.replace('title = "Mine"', f'title = "Mine"\nbos = "{setting}"'))
    from resting.benchmarks.assets import models

    loaded = LoadedModel(suite_file.load(str(path)), models.resolve(str(folder)), "cpu", lambda *_: None)
    first = made.bos_token_id
    calibration = loaded.calibrated_for(None).calibration
    for ids in (calibration.windows, calibration.matching, loaded.reference("wikipedia").windows):
        assert bool((ids[:, 0] == first).all()) == (setting == "always")
    lm = PackedLM(loaded.model, loaded.tokenizer, Scorer(loaded.model, 64), loaded.suite.bos)
    expected = made("w3 w4", add_special_tokens=False).input_ids
    assert lm.tok_encode("w3 w4") == [first] * (setting == "always") + expected
    pair = lm._encode_pair("w3 w4", " w7")
    assert pair == (lm.tok_encode("w3 w4"), made.convert_tokens_to_ids(["w7"]))


@pytest.mark.parametrize(("before", "setting", "begins"), [((), "always", True), (("w0",), "never", False)])
def test_prompts_are_scored_with_what_they_begin_with(llama, before, setting, begins):
    made = tokenizer(*before)
    lm = PackedLM(llama, made, Scorer(llama, 64), setting)
    found = lm.loglikelihood([Instance("loglikelihood", {}, ("w3 w4", " w7"), 0)], disable_tqdm=True)
    ids = [made.bos_token_id] * begins + made.convert_tokens_to_ids(["w3", "w4", "w7"])
    with torch.no_grad():
        expected = llama(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[ids[-1]]
    assert found[0][0] == pytest.approx(float(expected), rel=1e-5)


def test_a_prompt_that_has_its_bos_token_gets_no_second(llama):
    lm = PackedLM(llama, tokenizer("w0"), Scorer(llama, 64), "always")
    assert lm.tok_encode("w0 w3") == lm.tok_encode("w3")


def test_overlapping_windows_are_teal_s(monkeypatch):
    """TEAL: the text is tokenised once, with one BOS; windows begin every `stride` tokens until one is at the end."""
    tiny.provide_texts(monkeypatch)
    made, length, stride = tokenizer("w0"), 20, 4
    ids = made(" ".join(texts.documents("papers", "evaluation"))).input_ids
    assert ids[0] == made.bos_token_id != ids[1]
    end, expected = len(ids) - len(ids) % stride, []
    for begin in range(0, end, stride):
        expected.append(ids[begin : begin + length])
        if begin + length >= end:
            break
    found = windows_of("papers", "evaluation", made, length, None, stride=stride)
    assert found.ids.tolist() == expected
    assert found.available == len(expected)
    chosen = windows_of("papers", "evaluation", made, length, 3, stride=stride).ids.tolist()
    assert len(chosen) == 3
    assert all(window in expected for window in chosen)


def test_a_perplexity_over_overlapping_windows_is_teal_s(monkeypatch, llama):
    """Every window's last `stride` tokens are scored, as transformers' own loss does; the mean is over windows."""
    tiny.provide_texts(monkeypatch)
    windows = windows_of("papers", "evaluation", tokenizer("w0"), 20, 12, stride=4).ids
    losses = []
    for ids in windows:
        labels = ids.clone()[None]
        labels[:, :-4] = -100
        with torch.no_grad():
            losses.append(llama(ids[None], labels=labels).loss.double())
    reference = perplexity.DenseReference(llama, windows, 5)
    found = perplexity.score(
        reference, Plan({}, "dense", 0.0, 0.0, fingerprint.of_model(llama)), LastFraction(0.5), last=4
    )
    assert found.perplexity()[0] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found.scored_tokens == 4


def test_the_suite_of_published_settings_scores_as_teal_does():
    evaluation = suite_file.load("original").evaluation
    assert (evaluation.window, evaluation.scored, evaluation.stride) == (2048 + 512, 512, 512)


@pytest.mark.parametrize("table", ["stride = 4", "scored = 8\nstride = 4", "scored = 4\nstride = 17", "stride = 0"])
def test_strides_that_score_tokens_twice_or_never_are_refused(tmp_path, table):
    path = tmp_path / "mine.toml"
    path.write_text(tiny.SUITE.replace('texts = ["wikipedia"]', f'texts = ["wikipedia"]\n{table}'))
    with pytest.raises(SuiteError, match=r"evaluation\.stride = \d+: (would score tokens twice|must be greater)"):
        suite_file.load(str(path))


def test_what_windows_begin_with_is_a_part_of_a_cell_and_of_a_plan(tmp_path):
    suite = Suite.model_validate({"name": "a", "title": "A", "targets": [0.5], "methods": [{"name": "teal"}]})
    source = tiny_source(tmp_path)
    settings = [
        identity.fit_setting(suite.model_copy(update={"bos": setting}), source, "cpu")
        for setting in ("auto", "always", "never")
    ]
    assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == 3


def tiny_source(tmp_path):
    from resting.benchmarks.assets import models

    return models.resolve(str(tiny.model_folder(tmp_path / "some")))


def folder_of(family, path, made):
    build(family).save_pretrained(path)
    made.save_pretrained(path)


@pytest.fixture
def place(monkeypatch, tmp_path, cache):
    tiny.provide_texts(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def suite(place, setting):
    (place / "mine.toml").write_text(tiny.SUITE.replace('title = "Mine"', f'title = "Mine"\nbos = "{setting}"'))


def test_the_command_refuses_it_before_anything_is_measured(place, monkeypatch, capsys):
    folder_of("llama", place / "model", tokenizer(has_bos=False))
    suite(place, "always")
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "model") == 2
    assert 'bos = "always": the tokenizer has no BOS token; allowed: "auto" and "never"' in capsys.readouterr().err
    assert not (place / "results").exists()


@pytest.mark.parametrize(
    ("family", "before", "setting", "warned"),
    [
        ("gemma3", (), "auto", "its tokenizer adds none"),
        ("gemma3", ("w0",), "never", 'bos = "never"'),
        ("gemma3", (), "always", None),
        ("gemma3", ("w0",), "auto", None),
        ("llama", (), "auto", None),
    ],
)
def test_a_run_says_what_windows_begin_with(place, monkeypatch, capsys, family, before, setting, warned):
    folder_of(family, place / "model", tokenizer(*before))
    suite(place, setting)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "model") == 0
    said = capsys.readouterr().err
    assert said.count("warning: ") == (warned is not None)
    if warned:
        assert f"need a BOS token before every text, and model is measured without one ({warned})" in said
    begins = setting == "always" or (setting == "auto" and bool(before))
    facts = json.loads((place / "results" / "mine-model" / "provenance.json").read_text())
    assert facts["suite"]["bos"] == setting
    assert [cell["begins_with"] for cell in facts["cells"]] == [["w0"] if begins else []] * 2
    text = (place / "results" / "mine-model" / "README.md").read_text()
    sentence = "Windows begin with `w0`." if begins else "Windows begin without a BOS token."
    assert sentence in re.sub(r"\s+", " ", text)
