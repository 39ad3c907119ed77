"""Looks inside, on tiny models: the decomposition, and the fractions, against plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from families import build

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models
from resting.benchmarks.cells import expand
from resting.benchmarks.cells import suite_file as suites
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.studies import anchors, pruning, shift, stock
from resting.sparsifier import LINEAR_ROLES, CalibratedModel, Decoder, Site, Statistic


def test_the_shift_splits_into_mean_and_remainder():
    g = torch.Generator().manual_seed(0)
    dense, error = torch.randn(50, 6, generator=g).double(), torch.randn(50, 6, generator=g).double() + 0.5
    sums = shift._Sums()
    for part in (slice(0, 20), slice(20, 50)):
        sums.add(dense[part], dense[part] + error[part])
    row = sums.row()
    mean = error.mean(0)
    assert row["l2"] == pytest.approx(float(error.norm(dim=1).mean()))
    assert row["relative"] == pytest.approx(float(error.norm(dim=1).mean() / dense.norm(dim=1).mean()))
    assert row["mean_part"] == pytest.approx(float(mean.norm()))
    assert row["remainder"] == pytest.approx(float((error - mean).square().sum(1).mean().sqrt()))
    assert row["mean_part"] ** 2 + row["remainder"] ** 2 == pytest.approx(float(error.square().sum(1).mean()))


def test_block_outputs_are_the_model_s_hidden_states(model, ids):
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        found = shift.block_outputs(model, Decoder.of(model).layers, ids)
    assert len(found) == 3
    for block in (0, 1):  # the last one is normed in the model's own list
        assert torch.equal(found[block], expected[block + 1])


def test_the_shift_of_a_plan(llama, ids, calibration, monkeypatch):
    plan = Teal(0.5).fit(llama, calibration)
    cell = SimpleNamespace(config=SimpleNamespace(name="teal"), label="teal", target=0.5, seed=0, tokens=None)
    cell.policy = calibration.tokens
    bench = SimpleNamespace(
        model=llama,
        device="cpu",
        reference=lambda text: SimpleNamespace(windows=ids),
        on_progress=lambda *a: None,
    )
    monkeypatch.setattr(shift, "fitted", lambda bench, cell: plan)
    frame = shift.measure(bench, [cell], "news")
    with torch.no_grad():
        dense = llama(input_ids=ids, output_hidden_states=True).hidden_states[1]
        with plan.applied(llama):
            sparse = llama(input_ids=ids, output_hidden_states=True).hidden_states[1]
    expected = (sparse - dense)[:, 1:].flatten(0, 1).norm(dim=1).mean()
    assert float(frame[frame.block == 0].l2.iloc[0]) == pytest.approx(float(expected), rel=1e-5)
    assert list(frame.block) == [0, 1, 2]


def test_the_fraction_active_on_all_tokens(llama, calibration):
    windows = torch.randint(3, 97, (2, 33), generator=torch.Generator().manual_seed(5))
    calibrated = CalibratedModel(llama, calibration)
    bench = SimpleNamespace(
        model=llama,
        windows=lambda *a: SimpleNamespace(ids=windows),
        calibrated_for=lambda method: calibrated,
        device="cpu",
        on_progress=lambda *a: None,
    )
    frame = anchors.measure(bench, [0.25, 0.5], "news")
    assert list(frame.length.unique()) == [1, 2, 4, 8, 16, 32]
    t = calibrated.statistics(frozenset({Statistic.HISTOGRAM}))
    inputs = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0][0]))
        for layer in llama.model.layers
    ]
    total = 0.0
    for ids in windows:
        inputs.clear()
        with torch.no_grad():
            llama(ids[None])
        for block, x in enumerate(inputs):
            threshold = t[next(s for s in t.sites if s.block == block and s.role == "down")].quantile(0.5)
            total += sum(all(abs(float(v)) > threshold for v in x[1:5, i]) for i in range(48)) / 48
    for hook in hooks:
        hook.remove()
    row = frame[(frame.target == 0.5) & (frame.role == "down") & (frame.length == 4)]
    assert float(row.active_on_all.iloc[0]) == pytest.approx(total / 6, abs=1e-9)
    falls = frame[(frame.target == 0.5) & (frame.role == "q")].active_on_all
    assert falls.is_monotonic_decreasing


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_pruning_is_that_of_the_formulas(share):
    g = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(6, 10, generator=g), torch.rand(10, generator=g)
    by_row = pruning.wanda(weight, norms, share)
    for row, (w, left) in enumerate(zip(weight, by_row)):
        scores = [abs(float(value)) * float(norm) for value, norm in zip(w, norms)]
        gone = set(sorted(range(10), key=lambda i: scores[i])[: round(share * 10)])
        assert {i for i in range(10) if left[i] == 0} == gone, row
        assert torch.equal(left[left != 0], w[left != 0])
    whole = pruning.magnitude(weight, norms, share)
    smallest = weight.abs().flatten().sort().values[: round(share * 60)]
    assert torch.equal(weight[whole == 0].abs().sort().values, smallest)


def test_pruning_comes_back_bit_for_bit(llama, ids):
    decoder = Decoder.of(llama)
    norms = {site: torch.ones(decoder.linear(site).in_features) for site in decoder.sites(LINEAR_ROLES)}
    with torch.no_grad():
        before = llama(ids).logits
        with pruning.pruned(decoder, "wanda", norms, 0.5):
            assert float((decoder.linear(Site(0, "q")).weight == 0).float().mean()) == 0.5
        assert torch.equal(llama(ids).logits, before)
        with pytest.raises(KeyError, match="q"), pruning.pruned(decoder, "wanda", {}, 0.5):
            pass
        assert torch.equal(llama(ids).logits, before)


def test_the_norms_are_those_of_the_inputs(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    found = pruning.input_norms(
        SimpleNamespace(model=llama, calibrated_for=lambda m: calibrated, on_progress=lambda *a: None)
    )
    seen = []
    hook = llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, 1:]))
    with torch.no_grad():
        for ids, _ in calibration.statistics_batches():
            llama(ids)
    hook.remove()
    x = torch.cat(seen).flatten(0, 1).double()
    torch.testing.assert_close(found[Site(1, "down")], x.square().mean(0).sqrt())


def test_items_are_those_of_lm_eval_s_command_line(tmp_path):
    """One task of a hundred items, through the command line and through the study."""
    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "w0"  # lm-eval needs one
    tokenizer.save_pretrained(folder)
    study = SimpleNamespace(source=models.resolve(str(folder)), device="cpu")
    row = stock.compare(study, "copa", tmp_path, lambda *_: None)
    assert (row["items"], row["acc_same"]) == (100, 100)
    assert row["largest_gap"] < 1e-4
    assert row["acc_here"] == row["acc_there"]


def test_a_command_line_that_fails_is_said(tmp_path):
    with pytest.raises(SuiteError, match="lm-eval's command line ended with 1 on copa: "):
        stock.stock(tmp_path / "nowhere", "copa", tmp_path)


def test_a_suite_without_the_tasks_is_refused(tmp_path):
    loaded = suites.load("tasks")
    small = loaded.model_copy(update={"tasks": loaded.tasks.model_copy(update={"names": ["copa"]})})
    study = SimpleNamespace(suite=small, cells=lambda: expand.cells_of(small))
    with pytest.raises(SuiteError, match="needs a suite with a sparsifier and the tasks copa or openbookqa, and piqa"):
        stock.run(study, lambda *_: None)
