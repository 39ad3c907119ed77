"""What is timed on a GPU, here without graphs, in Triton's interpreter: the code around the clock is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny import TINY_LATENCY

from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.latency import matrices, random_models
from resting.benchmarks.latency.decode import neutral
from resting.benchmarks.latency.gpu import layouts
from resting.benchmarks.latency.gpu import model as gpu
from resting.benchmarks.latency.gpu import timer as gpu_timer
from resting.benchmarks.latency.gpu.graphs import OVERLAPPING, TUNED
from resting.benchmarks.latency.run import LatencyRun
from resting.benchmarks.latency.setting import Setting
from resting.benchmarks.latency.timed_model import load
from resting.benchmarks.names import of_device
from resting.benchmarks.progress import Console
from resting.sparsifier import Rule, Site, SparsifierError
from resting.sparsifier.decoding import cuda_layouts, cuda_overlap
from resting.sparsifier.roles import ACT

METHODS = [{"name": "teal"}, {"name": "cats", "targets": [0.25]}, {"name": "rsparse"}, {"name": "mean-error(teal)"}]


@pytest.fixture
def interpreted(monkeypatch):
    """The GPU's output layer on CPU tensors."""
    monkeypatch.setattr(gpu, "break_even", lambda weight: 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is run on the GPU itself there")
def test_every_method_decodes_what_its_plan_says(interpreted, tmp_path):
    suite = Suite.model_validate(TINY_LATENCY | {"targets": [0.4], "methods": METHODS})
    setting = Setting.of(suite, Options(tmp_path), Console(quiet=True))
    timed = load("tiny", "float32", setting)
    timed.ids = timed.ids[:, :6]
    model = gpu.GpuModel(timed, 2)
    dense = model.decode(None, compiled=False)
    with torch.inference_mode():
        for cell in setting.cells:
            plan = timed.plan(cell)
            model.compiled = False
            times = model.compare(dense, plan, timed.without_biases(cell, plan))
            assert len(times["dense"]) == len(times["sparse"]) == 3
            assert ("base" in times) == (cell.label == "mean-error(teal)")
            assert times["sparsity"] == pytest.approx(cell.target, abs=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_suite_is_run_on_the_device(tmp_path):
    table = {
        "prompt": 8,
        "decoded_tokens": 8,
        "cuda": {"dtypes": ["bfloat16"], "matrices": ["512x256"], "models": ["tiny"]},
    }
    suite = Suite.model_validate(TINY_LATENCY | {"latency": table, "methods": METHODS})
    folder = LatencyRun(suite, Options(tmp_path, device="cuda"), Console(quiet=True)).run()
    decoded = pd.read_csv(folder / "decode.csv")
    assert decoded.speedup.notna().all()
    assert set(decoded.method) == {"teal", "cats", "rsparse", "mean-error(teal)"}
    paths = json.loads((folder / "provenance.json").read_text())["dense_paths"]["tiny, bfloat16, 1 threads"]["seconds"]
    assert all(isinstance(seconds, float) for seconds in paths.values()), paths
    kernels = pd.read_csv(folder / "matrices.csv")
    assert {"linear", "linear, compiled", "linear, rows", "columns", "rows"} <= set(kernels.kernel)


@pytest.fixture(scope="module")
def small():
    """Two blocks of the shape of Llama-3-8B, on the GPU."""
    small = {"num_hidden_layers": 2, "vocab_size": 1024}
    model = random_models.random_model("llama-3-8b", torch.bfloat16, "cuda", **small)
    ids = torch.arange(96, device="cuda")[None]
    return gpu.GpuModel(SimpleNamespace(dense=model, ids=ids, declare=lambda: None), 2)


def decoded(decode):
    decode.begin()
    return torch.cat([decode.step().clone() for _ in range(80)])  # more than attention looks at together


def low_rank(role):
    """Factors whose product is small, for some of the layers that share a launch, and for down."""
    shapes = {"k": (1024, 300, 4096), "v": (1024, 70, 4096), "gate": (14336, 200, 4096), "down": (4096, 130, 14336)}
    if role not in shapes:
        return None
    outputs, rank, inputs = shapes[role]
    return torch.randn(outputs, rank), torch.randn(rank, inputs) / 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_launches_that_begin_early_change_no_bit(small, monkeypatch):
    empty = neutral(small.model)
    rules = {site: Rule(threshold=0.5 if site.role in ("q", "k", "v", "gate", "up") else 0.01) for site in empty.rules}
    more = {site: Rule(threshold=0.5, low_rank=low_rank(site.role)) for site in rules if site.role not in ("o", "up")}
    acts = {Site(block, ACT): Rule(threshold=0.1) for block in range(2)}
    with torch.inference_mode():
        for plan in (replace(empty, rules=rules), replace(empty, rules=rules | more), replace(empty, rules=acts)):
            found = []
            for early in (True, False):
                monkeypatch.setattr(cuda_overlap, "chained", lambda device, early=early: early)
                found.append(decoded(small.decode(plan, compiled=True)))
            assert torch.equal(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_tuned_is_what_runs(small):
    plan = replace(neutral(small.model), rules={})
    with torch.inference_mode():
        layouts.tune_layouts(small, plan, set())
        block = small.decode(plan, compiled=False).decoder.blocks[0]
    tuned = set(cuda_layouts.CHOSEN.values())
    assert {block.qkv.launch, block.o.launch, block.mlp.both.launch, block.down.launch} <= tuned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dense_paths_agree(small):
    with torch.inference_mode():
        graph = decoded(small.decode(None, compiled=False))
        for options in ((), (TUNED,), (TUNED, OVERLAPPING)):
            torch._dynamo.reset()
            decode = small.decode(None, True, *options)
            first = decoded(decode)
            assert torch.equal(first, decoded(decode))
            assert (first - graph).norm() < 0.03 * graph.norm()
        kernels = decoded(small.decode(neutral(small.model), compiled=True))
        assert (kernels - graph).norm() < 0.03 * graph.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is run on the GPU itself there")
def test_layouts_are_tuned_in_the_model_s_own_steps(interpreted, tmp_path, monkeypatch):
    suite = Suite.model_validate(TINY_LATENCY | {"targets": [0.4], "methods": METHODS[:1]})
    setting = Setting.of(suite, Options(tmp_path), Console(quiet=True))
    timed = load("tiny", "float32", setting)
    timed.ids = timed.ids[:, :4]
    monkeypatch.setattr(layouts, "PASSES", 1)
    monkeypatch.setattr(cuda_layouts, "CHOSEN", {})
    monkeypatch.setattr(
        cuda_layouts, "finalists", lambda shape: [cuda_layouts.SMALLEST, cuda_layouts.SMALLEST._replace(split=3)]
    )
    layouts.tune_layouts(gpu.GpuModel(timed, 1), timed.plan(setting.cells[0]), set())
    assert len(cuda_layouts.CHOSEN) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="is compiled on the GPU itself there")
def test_what_is_compiled_compiles_whole(interpreted, tmp_path):
    suite = Suite.model_validate(TINY_LATENCY | {"targets": [0.4], "methods": METHODS})
    setting = Setting.of(suite, Options(tmp_path), Console(quiet=True))
    timed = load("tiny", "float32", setting)
    model = gpu.GpuModel(timed, 3)
    with torch.inference_mode():
        for plan in (None, timed.plan(setting.cells[0])):
            plain, compiled = (model.decode(plan, compiled=False) for _ in range(2))
            step = compiled.decoder
            for module in (step.entry, step.exit, *(() if step.by_kernels else step.blocks)):
                module.compile(dynamic=False, fullgraph=True, backend="aot_eager")
            plain.begin()
            compiled.begin()
            assert torch.allclose(plain.step(), compiled.step(), atol=1e-6)


def test_layouts_are_tuned_at_the_target_nearest_to_half(monkeypatch):
    targets = {"a": (0.25, 0.6, 0.4), "b": (0.25,), "without a plan": (0.5,), "c": (0.7, 0.9)}
    cells = [SimpleNamespace(label=name, target=target) for name, all_ in targets.items() for target in all_]
    seen = []

    def plan(cell):
        if cell.label == "without a plan":
            raise SparsifierError("none")
        return cell.label, cell.target

    monkeypatch.setattr(gpu_timer, "tune_layouts", lambda model, plan, tuned: seen.append((plan, tuned)))
    monkeypatch.setattr(gpu_timer, "neutral", lambda model: "kernels")
    gpu_timer.tune_for_cells(SimpleNamespace(model=None), SimpleNamespace(plan=plan), cells)
    assert [of for of, _ in seen] == [("a", 0.4), ("b", 0.25), ("c", 0.7), "kernels"]
    assert len({id(tuned) for _, tuned in seen}) == 1


def test_a_gpu_timer_tunes_first_and_times_against_the_fastest_dense_path(monkeypatch):
    calls = []
    found = ("tuned graph", "dense step", {"tuned graph": 1.0})
    model = SimpleNamespace(
        fastest_dense=lambda: calls.append("dense") or found,
        compare=lambda *of: calls.append(of) or {"dense": []},
    )
    monkeypatch.setattr(gpu_timer, "GpuModel", lambda timed, prompt: calls.append((timed, prompt)) or model)
    monkeypatch.setattr(gpu_timer, "tune_for_cells", lambda *of: calls.append(of))
    timer = gpu_timer.GpuTimer("timed", 8, ["cell"])
    assert calls == [("timed", 8), (model, "timed", ["cell"]), "dense"]
    assert (timer.path, timer.tried) == ("tuned graph", {"tuned graph": 1.0})
    assert timer.times("plan", "base", None) == {"dense": []}
    assert calls[-1] == ("dense step", "plan", "base")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA", "gpu"),
    ],
)
def test_a_folder_is_called_by_the_device(name, slug):
    assert of_device(name) == slug


def test_graphs_are_timed_by_their_calls(monkeypatch):
    calls = []
    monkeypatch.setattr("resting.benchmarks.latency.timing.on_gpu", lambda call: call() or 6.0)
    times = matrices._replayed({"a": calls.append}, 5)
    assert set(times["a"]) == {0.24}
    assert set(calls) == set(range(25))


@pytest.mark.parametrize("overlaps", [True, False])
def test_dense_products_of_a_gpu_are_the_product(monkeypatch, overlaps):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, dynamic, options: asked.append(options) or call)
    monkeypatch.setattr(matrices, "overlaps", lambda device: overlaps)
    x, gate, weights = torch.randn(1, 1, 48), torch.randn(1, 1, 32), list(torch.randn(3, 32, 48))
    calls = matrices._on_gpu(x, weights, gate)
    assert asked == [{TUNED: True}] + [{TUNED: True, OVERLAPPING: True}] * overlaps
    for name, call in calls.items():
        for i in range(6):
            wanted = torch.nn.functional.linear(x, weights[i % 3]) * (gate if name == "linear, rows" else 1.0)
            assert torch.allclose(call(i), wanted, atol=1e-5), name
