"""What is timed on a GPU, here without graphs, in Triton's interpreter: the code around the clock is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from decoders import IDS, decoder_of
from host_kernels import COMPILER, host_function
from tiny import TINY_LATENCY

from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency import decode_rows, generating, matrices, random_models
from resting.benchmarks.latency.decode import neutral, weight_bytes
from resting.benchmarks.latency.gpu import timer as gpu_timer
from resting.benchmarks.latency.gpu.compiling import OVERLAPPING, TUNED
from resting.benchmarks.latency.gpu.dense_step import DenseStep
from resting.benchmarks.latency.run import LatencyRun
from resting.benchmarks.latency.setting import Setting
from resting.benchmarks.latency.timed_model import RandomModel, check_groups
from resting.benchmarks.names import of_device
from resting.benchmarks.progress import Console
from resting.sparsifier import AllButFirst, Decoder, Rule, Site
from resting.sparsifier.decoding import cuda_overlap, decoding
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda import choice, products
from resting.sparsifier.decoding.cuda.compiled import missing
from resting.sparsifier.decoding.cuda_quantised import QuantisedColumns
from resting.sparsifier.decoding.step import by_step
from resting.sparsifier.decoding.step.cuda_step import CudaStep
from resting.sparsifier.decoding.step.reading import read
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import quantise
from resting.sparsifier.roles import ACT

METHODS = [{"name": "teal"}, {"name": "cats", "targets": [0.25]}, {"name": "rsparse"}, {"name": "mean-error(teal)"}]


@pytest.fixture
def interpreted(monkeypatch):
    """The GPU's step on CPU tensors, and nothing compiled."""

    def step(plan, model, decoder, form, store, threads):
        return CudaStep(model, form, decoder, plan.rules, store)

    monkeypatch.setattr(by_step, "_step", step)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(gpu_timer, "GENERATE_PATHS", ("eager",))
    monkeypatch.setattr(gpu_timer, "DENSE_TRIAL", 2)
    monkeypatch.setattr(generating, "ROUNDS", 1)
    monkeypatch.setattr(generating, "FIRST", 1)
    monkeypatch.setattr(generating, "TRIAL", 3)


def timed(tmp_path, tokens, weights=None):
    """A model of one block, since the interpreter takes its time; its second copy stored in a weight format."""
    suite = Suite.model_validate(TINY_LATENCY | {"targets": [0.4], "methods": METHODS[-1:]})
    setting = Setting.of(suite, Options(tmp_path), Console(quiet=True))
    wider = {} if weights is None else {"hidden_size": 64, "intermediate_size": 96}
    copies = [random_models.random_model("tiny", torch.float32, num_hidden_layers=1, **wider) for _ in range(2)]
    if weights is not None:
        quantise(copies[1], Format.parse(weights))
    size, random = copies[0].config.vocab_size, torch.Generator().manual_seed(1)
    ids, windows = (torch.randint(3, size, shape, generator=random) for shape in ((1, tokens), (3, 48)))
    return setting.sparse_cells[0], RandomModel("tiny", copies, ids, windows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is run on the GPU itself there")
def test_a_gpu_timer_times_steps_and_generate(interpreted, tmp_path):
    cell, model = timed(tmp_path, 6)
    timer = gpu_timer.GpuTimer(model, 2)
    assert timer.path in timer.tried
    assert timer.generate_path == "eager"
    assert all(isinstance(seconds, float) for seconds in timer.tried.values())
    plan = model.plan(cell)
    times = timer.times(plan, model.without_biases(cell, plan), AllButFirst(1))
    assert len(times["dense"]) == len(times["sparse"]) == len(times["base"]) == 2
    assert len(times["generate_dense"]) == len(times["generate_sparse"]) == 3
    assert times["sparsity"] == pytest.approx(cell.target, abs=0.15)
    row = decode_rows.numbers(times, 1000, 100)
    assert row["generate_speedup"] == pytest.approx(row["generate_dense_p20"] / row["generate_sparse_p20"])
    assert row["generate_over_step"] == pytest.approx(row["generate_sparse_p20"] / row["sparse_p20"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is run on the GPU itself there")
def test_a_gpu_timer_times_quantised_weights_against_plain_ones(interpreted, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        QuantisedColumns, "fused", lambda self, *a, f=QuantisedColumns.fused, **k: read.append(1) or f(self, *a, **k)
    )
    cell, model = timed(tmp_path, 6, "int8-g32")
    timer = gpu_timer.GpuTimer(model, 2)
    assert isinstance(timer.tried["kernels"], float)  # nothing at rest, by the codes
    row = decode_rows.measured(model, timer, cell)
    assert read
    assert row["weight_format"] == "int8-g32"
    assert row["bits_a_weight"] == 8.5
    linears, rest = weight_bytes(model.dense)
    assert row["bytes_per_token"] == pytest.approx(linears / 32 * row["bits_read"] + rest)
    # the method's bias is read in 16 bits, which hardly counts
    assert row["bytes_per_token"] == pytest.approx(linears * 8.5 / 32 * (1 - row["byte_sparsity"]) + rest, rel=0.01)
    assert model.name == "tiny shape (random weights, then int8-g32)"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("int3-g128", "--weights int3-g128: GPU kernels take codes of 4 and 8 bits"),
        ("int4-g32-gptq", "--weights int4-g32-gptq: .* not depend on how codes were found; allowed: int4-g32"),
        ("int4-g128-zero", "symmetric around 0"),
        ("int4-g16", "a multiple of 32 outputs, not 16"),
    ],
)
def test_a_format_without_kernels_is_refused_before_anything_is_timed(weights, words, tmp_path):
    table = TINY_LATENCY["latency"] | {"cuda": TINY_LATENCY["latency"]["cpu"] | {"dtypes": ["bfloat16"]}}
    suite = Suite.model_validate(TINY_LATENCY | {"weights": ["as-is", weights], "latency": table})
    with pytest.raises(SuiteError, match=words):
        Setting.of(suite, Options(tmp_path, device="cuda"), Console(quiet=True))


def test_a_group_that_does_not_divide_a_matrix_is_refused_before_anything_is_timed(tmp_path):
    table = TINY_LATENCY["latency"] | {"cuda": TINY_LATENCY["latency"]["cpu"] | {"dtypes": ["bfloat16"]}}
    suite = Suite.model_validate(TINY_LATENCY | {"weights": ["int4-g32"], "latency": table})
    setting = Setting.of(suite, Options(tmp_path, device="cuda"), Console(quiet=True))
    with pytest.raises(SuiteError, match=r"--weights int4-g32: .* every 32 outputs, which does not"):
        check_groups(setting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
@torch.inference_mode()
def test_a_sparse_decode_is_the_step_of_decoding(interpreted, tmp_path):
    cell, model = timed(tmp_path, 7)
    plan = model.plan(cell)
    with plan.applied(model.sparse):
        wanted = model.sparse(model.ids).logits[:, 3:6]
    with decoding(plan, model.sparse):
        decode = gpu_timer.SparseDecode(model.sparse, model.ids, 2)
        found = torch.cat([decode.step().clone() for _ in range(3)], 1)
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "granite"])
@torch.inference_mode()
def test_a_dense_step_is_the_model(family):
    model = decoder_of(family)
    decoder = Decoder.of(model)
    wanted = model(IDS[:, :2]).logits
    step = DenseStep(model, read(model, decoder), decoder, 16)
    found = []
    for i in range(2):
        step.token.copy_(IDS[:, i : i + 1])
        found.append(step().clone())
    assert torch.allclose(torch.cat(found, 1), wanted, atol=2e-5)
    assert torch.allclose(model(IDS[:, :2]).logits, wanted, atol=1e-6)  # the model itself is as it was


@pytest.mark.skipif(torch.cuda.is_available(), reason="is compiled on the GPU itself there")
@torch.inference_mode()
def test_what_is_compiled_compiles_whole():
    model = decoder_of("llama")
    decoder = Decoder.of(model)
    form = read(model, decoder)
    plain, compiled = (DenseStep(model, form, decoder, 16) for _ in range(2))
    for module in (compiled.entry, compiled.exit, *compiled.blocks):
        module.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    assert torch.allclose(plain(), compiled(), atol=1e-6)


def test_a_model_without_a_form_is_refused():
    timed = SimpleNamespace(dense=decoder_of("mixtral"), name="mixtral")
    with pytest.raises(SuiteError, match="mixtral is not timed on a GPU: block 0 has k, o, q, v"):
        gpu_timer.GpuTimer(timed, 8)


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
    assert ("sums" in set(kernels.kernel)) == (missing(torch.device("cuda", 0)) is None)
    assert decoded.kernels.str.contains("2 ").all()
    assert (decoded.speedup_all <= decoded.speedup).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_launches_that_begin_early_change_no_bit(monkeypatch):
    model = random_models.random_model("llama-3-8b", torch.bfloat16, "cuda", num_hidden_layers=2, vocab_size=1024)
    empty = neutral(model)
    rules = {site: Rule(threshold=0.5 if site.role in ("q", "k", "v", "gate", "up") else 0.01) for site in empty.rules}
    more = {site: Rule(threshold=0.5, low_rank=low_rank(site.role)) for site in rules if site.role not in ("o", "up")}
    acts = {Site(block, ACT): Rule(threshold=0.1) for block in range(2)}
    ids = torch.arange(96, device="cuda")[None]
    for plan in (replace(empty, rules=rules), replace(empty, rules=rules | more), replace(empty, rules=acts)):
        found = []
        for early in (True, False):
            monkeypatch.setattr(cuda_overlap, "chained", lambda device, early=early: early)
            with decoding(plan, model):
                decode = gpu_timer.SparseDecode(model, ids, 2)
                found.append(torch.cat([decode.step().clone() for _ in range(80)]))
        assert torch.equal(*found)


def low_rank(role):
    """Factors whose product is small, for some of the layers that share a launch, and for down."""
    shapes = {"k": (1024, 300, 4096), "v": (1024, 70, 4096), "gate": (14336, 200, 4096), "down": (4096, 130, 14336)}
    if role not in shapes:
        return None
    outputs, rank, inputs = shapes[role]
    return torch.randn(outputs, rank), torch.randn(rank, inputs) / 1000


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


@pytest.mark.skipif(torch.cuda.is_available() or COMPILER is None, reason="runs compiled kernels on the processor")
def test_products_of_a_chain_leave_sums_and_make_zeros_for_the_next(monkeypatch):
    made = []
    columns = products.VotingColumns
    monkeypatch.setattr(products, "VotingColumns", lambda *a, **k: made.append(columns(*a, **k)) or made[-1])
    monkeypatch.setattr(products, "function", host_function)
    monkeypatch.setattr(matrices, "missing", lambda device: None)
    monkeypatch.setattr(choice, "fastest", lambda launch, like, share: ([2, 16, 8], 0.0, 0.0))
    x, weights = torch.randn(1, 1, 48).bfloat16(), torch.randn(5, 264, 48).bfloat16()
    cutoff = float(x.abs().float().quantile(0.5))
    calls = matrices._sums(x, [input_major(w) for w in weights], {0.5: cutoff, 0.0: 0.0})
    assert set(calls) == {"sums 0.5"}
    kept = torch.where(x.abs() > cutoff, x, 0).double().flatten()
    assert len(made) == 4  # the last makes zeros for the first
    for i in range(6):
        calls["sums 0.5"](i)
        assert torch.allclose(made[i % 4].sums.values, weights[i % 4].double() @ kept, atol=1e-4)
        assert not made[(i + 1) % 4].sums.words.any()
    assert not matrices._sums(x.float(), [input_major(w.float()) for w in weights], {0.5: cutoff})


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
