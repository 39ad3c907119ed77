"""`resting.fit`: what it fits on, what it measures, and what the plan says of it."""

from __future__ import annotations

from importlib import metadata

import pytest
import tiny
import torch
from fits import WINDOW, as_sets, documents, looked_at, of, windows_of
from torch import nn

import resting
from resting import AllButFirst, DecodeOnly, LastFraction, Plan, Rule, Spontaneous, Teal
from resting.benchmarks.assets import gguf, models, texts
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.fitting import documents as reading
from resting.benchmarks.fitting import material
from resting.benchmarks.fitting.material import Sizes
from resting.benchmarks.quality import windows as suites
from resting.benchmarks.using import opening
from resting.sparsifier import TargetUnreachableError

SIZES = Sizes(window=WINDOW)


def cut(text, held_out=None, sizes=SIZES) -> material.Material:
    return material.of(reading.read(text, held_out), tiny.tokenizer(), sizes)


@pytest.mark.parametrize("method", ["teal", "spon-refined(teal)"])
def test_measured_numbers_are_those_of_a_loop_of_its_own(llama, method):
    plan = of(llama, method)
    measured, held_out = (
        plan.info["measured"],
        cut(documents(), sizes=Sizes(window=WINDOW, held_out_windows=4)).held_out,
    )
    own = looked_at(llama, plan, held_out)
    assert measured["tokens"] == held_out.shape[0] * (WINDOW - 1)
    for name, value in own.items():
        assert measured[name] == pytest.approx(value, abs=2e-5), name
    assert measured["difference"] == pytest.approx(own["sparse_loss"] - own["dense_loss"], abs=2e-5)
    assert measured["difference_low"] < measured["difference"] < measured["difference_high"]
    assert measured["byte_sparsity"] == pytest.approx(0.5, abs=0.02)


def test_a_list_is_cut_between_documents_near_the_last_tenth():
    given = documents()
    found = cut(given)
    fitted, held_out = windows_of(given[:36]), windows_of(given[36:])
    assert as_sets(found.calibration.windows) == {tuple(w) for w in fitted}
    assert as_sets(found.held_out) <= {tuple(w) for w in held_out}
    assert len(found.held_out) == min(16, len(held_out))


def test_a_file_is_cut_at_its_last_tenth(tmp_path):
    whole = " ".join(documents())
    (tmp_path / "mine.txt").write_text(whole)
    found = cut(str(tmp_path / "mine.txt"))
    words = whole.split()
    keep = len(words) // 10
    assert as_sets(found.calibration.windows) == {tuple(w) for w in windows_of(words[:-keep])}
    assert as_sets(found.held_out) <= {tuple(w) for w in windows_of(words[-keep:])}
    assert (found.text, found.held_out_text) == ("mine.txt", "mine.txt")


def test_a_known_text_is_cut_as_suites_cut_it(monkeypatch):
    tiny.provide_texts(monkeypatch)
    found, tokenizer = cut("wikipedia"), tiny.tokenizer()
    ours = suites.windows_of("wikipedia", "calibration", tokenizer, WINDOW, None).ids
    assert as_sets(found.calibration.windows) == as_sets(ours)
    assert len(found.calibration.windows) == len(ours)
    held_out = suites.windows_of("wikipedia", "evaluation", tokenizer, WINDOW, 16).ids
    assert torch.equal(found.held_out, held_out)
    assert not as_sets(found.calibration.windows) & as_sets(found.held_out)


def test_windows_begin_with_a_bos_token_where_suites_have_one(monkeypatch):
    tiny.provide_texts(monkeypatch)
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "w5"
    found = material.of(reading.read("wikipedia"), tokenizer, SIZES, bos="always")
    assert (found.calibration.windows[:, 0] == 8).all()
    held_out = suites.windows_of("wikipedia", "evaluation", tokenizer, WINDOW, 16, bos="always").ids
    assert torch.equal(found.held_out, held_out)


def test_another_text_may_be_held_out_and_then_all_is_fitted_on(monkeypatch, tmp_path):
    tiny.provide_texts(monkeypatch)
    given = documents()
    found = cut(given, "papers")
    assert as_sets(found.calibration.windows) == {tuple(w) for w in windows_of(given)}
    assert found.held_out_text == "papers"
    (tmp_path / "other.txt").write_text(" ".join(documents(8, seed=1)))
    other = cut("wikipedia", tmp_path / "other.txt")
    assert as_sets(other.held_out) <= {tuple(w) for w in windows_of(documents(8, seed=1))}


def test_windows_and_matching_come_from_what_is_fitted_on():
    found = cut(documents(), sizes=Sizes(windows=5, window=WINDOW))
    assert len(found.calibration.windows) == 5
    assert as_sets(found.calibration.matching) <= as_sets(found.calibration.windows)


def test_a_text_for_calibration_only_is_divided(monkeypatch):
    monkeypatch.setitem(texts.CORPORA, "c4", texts.Corpus(documents, ("calibration",), "made up"))
    found = cut("c4")
    assert as_sets(found.held_out) <= {tuple(w) for w in windows_of(documents()[36:])}


def test_the_plan_is_that_of_the_method_on_these_windows(llama):
    own = Teal(target=0.5).fit(llama, cut(documents()).calibration)
    plan = of(llama, "teal", target=0.5, statistics_windows=16, matching_windows=16)
    assert {site: float(rule.threshold) for site, rule in plan.rules.items()} == {
        site: float(rule.threshold) for site, rule in own.rules.items()
    }
    assert plan.calibration == own.calibration


def test_the_plan_says_how_it_was_made_in_files_too(llama, tmp_path):
    plan = of(llama, target=0.4, seed=3)
    fitted = plan.info["fitted"]
    assert fitted["method"] == "spon-refined(teal)"
    assert fitted["parameters"]["seed"] == 3
    assert fitted["parameters"]["steps"] == 8
    assert (fitted["target"], fitted["text"], fitted["window"]) == (0.4, "own text", WINDOW)
    assert fitted["tokens"] == fitted["windows"] * WINDOW == cut(documents()).calibration.windows.numel()
    assert (fitted["token_policy"], fitted["dtype"], fitted["device"]) == ("all-but-first-1", "float32", "cpu")
    assert fitted["fingerprint"] == plan.model
    assert fitted["versions"]["torch"] == metadata.version("torch")
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").info == plan.info


def test_a_folder_of_this_machine_is_not_named(llama, tmp_path):
    llama.save_pretrained(tmp_path / "mine")
    plan = of(type(llama).from_pretrained(tmp_path / "mine"), "teal")
    assert plan.info["fitted"]["model"] == "mine"
    assert str(tmp_path) not in str(plan.info)


def test_the_embedded_model_is_named_such_that_it_is_found_again(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path))
    folder = gguf.folder_of(models.SMOLLM2_SHA256)
    llama.save_pretrained(folder)  # where a run converts it to
    plan = of(type(llama).from_pretrained(folder), "teal")
    assert plan.info["fitted"]["model"] == models.DEFAULT
    assert opening.model_of(plan, tmp_path / "plan") == models.DEFAULT


def test_the_model_is_left_as_it_was(llama):
    llama.train()
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    layers = [type(module) for module in llama.modules()]
    of(llama)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert [type(module) for module in llama.modules()] == layers
    assert llama.training
    assert all(p.requires_grad for p in llama.parameters())


def test_a_method_that_is_made_already_has_its_own_target(llama):
    method = Spontaneous(Teal(target=0.3), steps=2, batch=2, window=WINDOW)
    plan = resting.fit(
        llama, method, tokenizer=tiny.tokenizer(), text=documents(), window=WINDOW, progress=False, target=0.3
    )
    assert plan.target == 0.3
    assert plan.info["measured"]["byte_sparsity"] == pytest.approx(0.3, abs=0.02)


def test_the_token_policy_is_that_of_fit_and_measurement(llama):
    plan = of(llama, "teal", tokens=LastFraction(0.5))
    assert plan.info["fitted"]["token_policy"] == "last-0.5"
    assert plan.info["measured"]["tokens"] == plan.info["measured"]["windows"] * (WINDOW // 2 - 1)


def test_progress_is_told_stage_by_stage_and_printed_on_standard_error(llama, capsys):
    told: list[tuple[str, int, int]] = []
    of(llama, progress=lambda stage, done, total, note: told.append((stage, done, total)))
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    assert {"match teal", "train", "match spon-refined(teal)", "measure dense", "measure sparse"} <= set(stages)
    assert all(0 <= done <= total for _, done, total in told)
    assert ("train", 8, 8) in told
    of(llama, "teal", progress=True)
    assert capsys.readouterr().out == ""


class Stuck(Teal):
    """TEAL whose thresholds never move."""

    def rule(self, site, statistics, ratio):
        return Rule(threshold=statistics[site].quantile(0.2))


def test_a_target_that_no_threshold_meets_is_said(llama):
    with pytest.warns(UserWarning, match=r"teal leaves 0\.[12]\d+ of the bytes unread .*: no threshold meets"):
        plan = of(llama, Stuck(0.5))
    assert plan.info["measured"]["byte_sparsity"] < 0.3


def test_a_target_above_the_ceiling_is_refused(llama):
    with pytest.raises(TargetUnreachableError, match=r"byte sparsity 0\.9 is above this method's ceiling of"):
        of(llama, "cats", target=0.9)


SHORT = ["w1 " * 20]
REFUSED = {
    "no method": ({"method": "teel"}, r"unknown method 'teel' \(did you mean 'teal'\?\); allowed: "),
    "a method of nothing": ({"method": "spon"}, r"method 'spon' must be written spon\(METHOD\)"),
    "the dense model": ({"method": "dense"}, "'dense' leaves nothing unread"),
    "no name": ({"method": 5}, "method must be a name such as 'teal' or a resting.Sparsifier, got int"),
    "a method's own protocol": (
        {"parameters": {"protocol": "original"}},
        "follows the protocol 'original', which suites run",
    ),
    "steps of no training": ({"steps": 4}, "method 'teal' has no parameter 'steps'; allowed: "),
    "a seed of no chance": ({"seed": 4}, "method 'teal' has no parameter 'seed'; allowed: "),
    "no steps": ({"method": "spon(teal)", "steps": 0, "window": 64}, "steps must be at least 1, got 0"),
    "a parameter twice": ({"steps": 4, "parameters": {"steps": 4}}, "steps is given twice"),
    "a target of nothing": ({"target": 0.0}, "target = 0.0: must be a number between 0 and 1"),
    "a target of all": ({"target": 1}, "target = 1: must be a number between 0 and 1"),
    "a target in percent": ({"target": 50.0}, "target = 50.0: must be a number between 0 and 1"),
    "a target that is none": ({"target": float("nan")}, "target = nan: must be a number between 0 and 1"),
    "a target that is text": ({"target": "0.5"}, "target = '0.5': must be a number between 0 and 1"),
    "two targets": ({"method": Teal(0.4), "target": 0.5}, "target = 0.5: teal was made with target = 0.4"),
    "a made method of nothing": ({"method": Teal(0.0)}, "target = 0.0: must be a number between 0 and 1"),
    "steps of a made method": ({"method": Teal(0.4), "steps": 3}, "steps has no meaning for a method that is made"),
    "a window below training": (
        {"method": "spon-refined(teal)"},
        r"window = 16: spon-refined\(teal\) trains on windows of 128 tokens; allowed: 128 and more",
    ),
    "a window above the model": ({"window": 65}, "window = 65: the model has 64 positions; allowed: up to 64"),
    "a window of nothing": ({"window": 4}, "window = 4: must be a whole number, at least 8"),
    "no windows": ({"windows": 0}, "windows = 0: must be a whole number, at least 1"),
    "too many windows": (
        {"windows": 900},
        "own text has 2400 tokens to fit on and to measure on, and 14416 are needed",
    ),
    "too little text": ({"text": SHORT}, "own text has 20 tokens to fit on and to measure on, and 32 are needed"),
    "too little at the end": (
        {"text": [*documents(3), "w1 w2"], "windows": 9},
        "own text without what is held out has 120 tokens to fit on, and 144 are needed",
    ),
    "too little held out": (
        {"held_out": SHORT, "window": 64},
        "own text has 20 tokens to measure on, and 64 are needed",
    ),
    "no text": ({"text": []}, "own text holds no text"),
    "blank text": ({"text": ["  ", "\n"]}, "own text holds no text"),
    "text that is none": ({"text": 5}, "a text must be a name, the path of a file or a list of str, got int"),
    "documents that are none": ({"text": [1, 2]}, "a text must be a name, the path of a file or a list of str, got l"),
    "an unknown text": ({"text": "wikipaedia"}, "there is no text 'wikipaedia'; allowed: wikipedia, papers, stories, "),
    "text in place of a name": ({"text": "a b " * 200}, "text file .* cannot be read: File name too long"),
    "a test set": ({"text": "wikitext2"}, "wikitext2 is a test set: calibrate on another text"),
    "what is fitted on, held out": (
        {"held_out": documents()},
        "a document of the held-out text own text stands in own",
    ),
    "most of it held out": (
        {"text": ["\n".join(documents())], "held_out": ["\n".join([*documents()[:9], "another line"])]},
        r"\d+% of the held-out text own text stands in own text, which is fitted on",
    ),
    "no sparse token": ({"tokens": DecodeOnly()}, "tokens = decode-only: leaves every token of a window of 16 dense"),
    "one sparse token": ({"tokens": AllButFirst(15)}, "tokens = all-but-first-15: leaves every token"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_will_not_do_is_refused_before_anything_is_computed(llama, monkeypatch, change, said):
    def forbidden(*arguments: object, **named: object) -> None:
        raise AssertionError("the model ran")

    llama.register_forward_pre_hook(forbidden)
    llama.model.register_forward_pre_hook(forbidden)
    arguments = {"method": "teal", "tokenizer": tiny.tokenizer(), "text": documents(), "window": WINDOW} | change
    with pytest.raises((BenchmarkError, ValueError), match=said) as stop:
        resting.fit(llama, arguments.pop("method"), progress=False, **arguments)
    assert "\n" not in str(stop.value)


def test_a_text_file_that_cannot_be_read_is_refused(llama, tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BenchmarkError, match=r"mine.txt cannot be read: it is not UTF-8 text"):
        of(llama, "teal", text=tmp_path / "mine.txt")
    with pytest.raises(BenchmarkError, match=r"cannot be read: Is a directory"):
        of(llama, "teal", text=str(tmp_path))


def test_tokens_without_an_embedding_are_refused(llama):
    llama.resize_token_embeddings(60)
    with pytest.raises(BenchmarkError, match="its model has embeddings of numbers below 60"):
        of(llama, "teal")


def test_a_loss_that_is_not_finite_is_no_number(llama):
    nn.init.constant_(llama.lm_head.weight, float("inf"))
    with pytest.raises(ValueError, match=r"infinite|NaN|not finite"):
        of(llama, "teal")
