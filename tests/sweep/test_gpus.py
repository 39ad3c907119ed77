"""Which device a worker takes, and a model over all of them."""

from __future__ import annotations

import pytest
import tiny
import torch
from filelock import FileLock
from two_models import rows_of, suite_of

from resting.benchmarks import cache, provenance
from resting.benchmarks.cells import identity
from resting.benchmarks.cells.identity import kind_of
from resting.benchmarks.cli.options import check_device
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.quality.perplexity import DenseReference, score
from resting.benchmarks.sweep import gpus
from resting.sparsifier import AllButFirst, Decoder, Plan, Rule, check_logits, fingerprint


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpus, "PATIENCE", 0.01)


def test_workers_of_one_machine_take_different_gpus(two_gpus):
    with gpus.leased("cuda") as first, gpus.leased("cuda") as second:
        assert (first, second) == ("cuda:0", "cuda:1")
    with gpus.leased("cuda") as again:
        assert again == "cuda:0"


def test_a_worker_waits_for_a_free_gpu(two_gpus, monkeypatch):
    (cache.root() / "gpus").mkdir()
    held = [FileLock(cache.root() / "gpus" / f"{i}.lock") for i in range(2)]
    for lock in held:
        lock.acquire()
    waits = []
    monkeypatch.setattr(gpus.time, "sleep", lambda seconds: (waits.append(seconds), held[1].release()))
    with gpus.leased("cuda") as device:
        assert device == "cuda:1"
    assert waits == [0.01]


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "auto"])
def test_a_named_device_is_taken_as_it_is(two_gpus, device):
    with gpus.leased(device) as found:
        assert found == device


def test_one_gpu_needs_no_lease(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with gpus.leased("cuda") as found:
        assert found == "cuda"


def test_values_depend_on_the_kind_of_device():
    assert [kind_of(d) for d in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda"]
    assert kind_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_auto_is_for_runs():
    check_device("auto", auto=True)
    with pytest.raises(BenchmarkError, match="--device 'auto'"):
        check_device("auto")


def test_what_a_gpu_measured_is_looked_up_without_one(here, monkeypatch, capsys):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(identity, "kind_of", lambda device: "cuda")
        assert tiny.resting(monkeypatch, "run", suite_of(here, "a/model")) == 0
    measured = rows_of(here / "results" / "mine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = ["run", "both.toml", "--device", "cuda", "--output", "found"]
    assert tiny.resting(monkeypatch, *found, "--mode", "only-cache") == 0
    assert rows_of(here / "found" / "mine").equals(measured)
    for refused in ([], ["--mode", "force"], ["--mode", "only-cache", "--dry-run"]):
        assert tiny.resting(monkeypatch, *found, *refused) == 2
        assert "--device 'cuda'; allowed: cpu (no CUDA device here)" in capsys.readouterr().err


@pytest.mark.real
def test_a_model_over_all_devices_is_the_model(embedded):
    ids = torch.arange(40, 72)[None]
    whole, spread = embedded.load(torch.float32), embedded.load(torch.float32, "auto")
    with torch.inference_mode():
        found = spread(input_ids=ids.to(next(spread.parameters()).device)).logits.cpu()
        assert torch.allclose(found, whole(input_ids=ids).logits, atol=1e-4)
    check_logits(spread)  # of two devices where the machine has two
    policy, windows = AllButFirst(1), torch.arange(40, 104).view(2, 32)
    rules = {site: Rule(threshold=0.3) for site in Decoder.of(spread).sites()}
    scores = []
    for model in (whole, spread):
        plan = Plan(rules, "x", 0.5, 0.5, fingerprint.of_model(model))
        scores.append(score(DenseReference(model, windows, 2), plan, policy))
    assert scores[1].nll == pytest.approx(scores[0].nll, rel=1e-4)
    assert scores[1].byte_sparsity == pytest.approx(scores[0].byte_sparsity, abs=1e-4)
    assert provenance.collect("auto")["device"]
