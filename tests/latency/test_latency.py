"""The suite that measures time: what it computes from times, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from families import build
from page_folder import RESULTS
from tiny import TINY_LATENCY, resting

from resting.baselines.teal import Teal
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.cells.suite_file import load
from resting.benchmarks.errors import BenchmarkError, SuiteError
from resting.benchmarks.latency import cpu_timer, decode, decode_rows, generating, matrices, random_models, timing
from resting.benchmarks.latency.record import Record
from resting.benchmarks.latency.run import LatencyRun
from resting.benchmarks.progress import Console
from resting.benchmarks.report import latency_tables
from resting.sparsifier import AllButFirst, Calibration, DecodeOnly, Meter, SparsifierError
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.quantised.formats import Format


def test_nothing_but_a_gpu_run_needs_triton():
    modules = ("cli.main", "run", "latency.run", "studies.speed", "checks.guard.run", "page.build")
    names = ", ".join(["resting.sparsifier.decoding", *(f"resting.benchmarks.{name}" for name in modules)])
    code = f"import sys; sys.modules['triton'] = None; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_alternatives_are_timed_in_turn_on_other_weights():
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    times = timing.interleaved({name: seen[name].append for name in seen}, 6)
    assert {len(t) for t in times.values()} == {6}  # the first round is not counted
    assert sorted([*seen["a"], *seen["b"], *seen["c"]]) == list(range(21))
    assert seen["a"][:3] == [0, 5, 7]  # first, last, middle of its round


def test_a_suite_of_times_is_run_and_reported(tmp_path):
    folder = LatencyRun(Suite.model_validate(TINY_LATENCY), Options(tmp_path), Console(quiet=True)).run()
    assert not (folder / "README.md").exists()
    latency_tables.write(folder)
    decoded = pd.read_csv(folder / "decode.csv")
    assert list(decoded.method) == ["teal", "mean-error(teal)", "teal"]  # all methods at the first target come first
    assert ((decoded.byte_sparsity - decoded.target).abs() < 0.1).all()
    assert decoded.speedup.to_numpy() == pytest.approx((decoded.dense_p20 / decoded.sparse_p20).to_numpy(), rel=1e-3)
    assert decoded.share.to_numpy() == pytest.approx((decoded.speedup / decoded.limit).to_numpy(), rel=1e-3)
    kernels = pd.read_csv(folder / "matrices.csv")
    dense = kernels[kernels.sparsity == 0.0]
    assert dense.speedup.max() == pytest.approx(1.0)  # of the fastest one, which the others are measured by
    raw = pd.read_parquet(folder / "decode-raw.parquet")
    assert {len(values) for values in raw.raw_sparse} == {8}
    text = (folder / "README.md").read_text()
    assert "tiny shape (random weights), float32, 1 thread" in text
    assert "resting run tiny" in text


STOPPED = """
name = "stopped"
title = "Stopped"
targets = [0.25, 0.5]
[evaluation]
texts = []
[latency]
prompt = 8
decoded_tokens = 8
[latency.cpu]
models = ["tiny", "llama-3.2-1b"]
[[methods]]
name = "teal"
"""


def test_what_was_timed_before_a_run_is_stopped_is_reported(tmp_path, monkeypatch):
    (tmp_path / "stopped.toml").write_text(STOPPED)
    monkeypatch.setattr(cpu_timer, "fastest_dense", lambda *_: ("eager", {"eager": 1.0}))
    monkeypatch.setattr(generating, "fastest_dense", lambda *_: ("eager", {"eager": 1.0}))
    measured = decode_rows.measured

    def once(model, timer, cell):
        if cell.target == 0.5:
            sys.exit(143)  # as at SIGTERM
        return measured(model, timer, cell)

    monkeypatch.setattr(decode_rows, "measured", once)
    arguments = "run", str(tmp_path / "stopped.toml"), "--output", str(tmp_path / "out")
    assert resting(monkeypatch, *arguments) == 143
    folder = tmp_path / "out" / "stopped"
    assert list(pd.read_csv(folder / "decode.csv").target) == [0.25]
    (missing,) = re.findall(r"not reached before the run was ended: (.*)\.\n", (folder / "README.md").read_text())
    assert missing == "1 of 2 cells of tiny shape (random weights), llama-3.2-1b"


def test_a_run_that_measured_nothing_leaves_no_folder(tmp_path):
    suite = Suite.model_validate(TINY_LATENCY | {"latency": {"cpu": {"models": ["nosuch"]}}})
    timed = LatencyRun(suite, Options(tmp_path), Console(quiet=True))
    with pytest.raises(BenchmarkError, match="no model 'nosuch'"):
        timed.run()
    assert not timed.record.has_rows
    assert not list(tmp_path.iterdir())


def test_a_cell_without_a_plan_has_a_reason():
    def plan(cell):
        raise SparsifierError("no plan at this target")

    timed, timer, cell = SimpleNamespace(plan=plan), SimpleNamespace(), SimpleNamespace()
    assert decode_rows.measured(timed, timer, cell) == {"reason": "no plan at this target"}


def test_numbers_of_a_row_are_those_of_the_raw_seconds():
    times = {"dense": [0.04] * 5, "sparse": [0.02] * 5, "base": [0.016] * 5, "sparsity": 0.5}
    row = decode_rows.numbers(times | {"prefill_dense": [2.0, 1.0], "prefill_sparse": [3.0]}, 800, 200)
    expected = {"speedup": 2.0, "limit": 1000 / 600, "share": 1.2, "bytes_per_token": 600.0, "bandwidth": 30000.0}
    expected |= {"over_base": 1.25, "tokens_per_second": 50.0, "prefill_dense": 1.0, "prefill_sparse": 3.0}
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_bytes_are_those_of_a_step():
    model = build("llama")
    linears, rest = decode.weight_bytes(model)
    decoder = Decoder.of(model)
    assert linears == sum(decoder.linear(s).weight.numel() for s in decoder.sites()) * 4
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert rest == 4 * (97 * 32 + norms)  # the output layer, and not the embedding


def test_dense_paths_give_the_same_logits():
    model = build("llama")
    ids = torch.randint(3, 97, (1, 16))
    logits = []
    for path in ("eager", "static cache", "kernels"):
        with decode.dense_path(model, path, 1) as begin, torch.inference_mode():
            run_ = begin(ids, 8)
            logits.append(torch.cat([run_.step() for _ in range(6)], 1))
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert torch.allclose(logits[0], logits[2], atol=1e-5)


def test_the_sparsity_is_of_the_decoded_tokens():
    model = build("llama")
    ids = torch.randint(3, 97, (4, 24))
    plan = Teal(target=0.5).fit(model, Calibration(ids))
    found = decode.what_is_read(model, plan, ids[:1], 8)
    meter = Meter()
    with plan.applied(model, DecodeOnly(8), meter), torch.inference_mode():
        model(input_ids=ids[:1])
    assert found == {"sparsity": meter.byte_sparsity()}
    bits = decode.what_is_read(model, plan, ids[:1], 8, Format.parse("int8-g16"))["bits"]
    assert bits == pytest.approx(9.0 * (1.0 - meter.byte_sparsity()))
    timed = SimpleNamespace(format=None, dense=model, sparse=build("llama"), ids=ids[:1], declare=lambda: None)
    timer = cpu_timer.CpuTimer(timed, 8, 1, ["eager"])
    times = timer.times(plan, None, AllButFirst(1))
    assert len(times["dense"]) == len(times["sparse"]) == 15
    assert timer.path == "eager"
    assert times["sparsity"] == found["sparsity"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency": {"cpu": {"matrices": ["8x64"]}}}, "at least 16x16"),
        ({"latency": {"cpu": {"models": ["nosuch"]}}}, "no model 'nosuch'"),
        ({"latency": {"cuda": {"models": ["tiny"]}}}, "has nothing to time on cpu"),
    ],
)
def test_bad_tables_are_refused(change, message, tmp_path):
    with pytest.raises(BenchmarkError, match=message):
        LatencyRun(Suite.model_validate(TINY_LATENCY | change), Options(tmp_path), Console(quiet=True)).run()
    with pytest.raises(SuiteError, match="INPUTSxOUTPUTS"):
        matrices.Matrix.parse("axb")


def test_keys_are_named(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        'name = "x"\ntitle = "x"\ntargets = [0.5]\n[latency.cpu]\nmatrix = []\n[[methods]]\nname = "teal"\n'
    )
    with pytest.raises(SuiteError, match=r"unknown key 'latency\.cpu\.matrix'; allowed here: .*matrices"):
        load(str(path))
    text = '[evaluation]\ntexts = ["wikipedia"]\n[latency.cpu]\n[[methods]]\nname = "teal"\n'
    path.write_text('name = "x"\ntitle = "x"\ntargets = [0.5]\n' + text)
    with pytest.raises(SuiteError, match="either time or quality"):
        load(str(path))


def test_a_run_that_was_ended_says_what_it_did_not_reach(tmp_path):
    cut = [
        "13 of 21 cells of llama-3-8b shape (random weights)",
        "14336x4096, 4096x28672, 4096x4096, 4096x6144, 4096x1024",
    ]
    matrices = "11008x4096, 8192x1024, 1024x8192, 8192x3584, 3584x8192"
    for name, missing in (("latency-7b-h200", ["qwen3-8b", matrices]), ("latency-8b-h200", cut)):
        folder = shutil.copytree(RESULTS / name, tmp_path / name)
        latency_tables.write(folder)
        found = re.findall(r"not reached before the run was ended: (.*)\.", (folder / "README.md").read_text())
        assert found == missing


def test_codes_of_an_earlier_run_do_not_stay_in_a_folder(tmp_path):
    files = [tmp_path / name for name in ("quantised.csv", "quantised-raw.parquet")]
    coded = {"matrix": "8x8", "weights": "int8-g8", "raw": [0.1]}
    Record(tmp_path, {}, quantised=[coded], decode=[{"raw": [0.1]}]).save()
    assert all(file.exists() for file in files)
    Record(tmp_path, {}, decode=[{"raw": [0.1]}]).save()
    assert not any(file.exists() for file in files)


def test_dense_paths_are_those_of_the_same_format(tmp_path):
    folder = LatencyRun(Suite.model_validate(TINY_LATENCY), Options(tmp_path), Console(quiet=True)).run()
    decoded = pd.read_csv(folder / "decode.csv")
    coded = decoded.assign(model="tiny shape (random weights, then int8-g8)", weight_format="int8-g8")
    pd.concat([decoded, coded]).to_csv(folder / "decode.csv", index=False)
    facts = json.loads((folder / "provenance.json").read_text())
    (key,) = facts["dense_paths"]
    of_codes = facts["dense_paths"][key] | {"fastest": "a path of its own"}
    facts["dense_paths"][key.replace("float32", "float32, int8-g8")] = of_codes
    (folder / "provenance.json").write_text(json.dumps(facts))
    folder = folder.rename(tmp_path / "tiny-h200")  # as a run on a GPU names it
    latency_tables.write(folder)
    text = (folder / "README.md").read_text()
    assert "--model" not in text  # which a suite of times refuses
    first, second = text.split("### tiny shape (random weights, then int8-g8)")
    assert "Dense below is **a path of its own**" not in first
    assert "Dense below is **a path of its own**" in second
    pictures = re.findall(r"!\[Speed against measured byte sparsity\]\(([^)]+)\)", text)
    assert len(set(pictures)) == 2


def test_a_model_in_codes_is_timed_from_its_codes(tmp_path):
    suite = TINY_LATENCY | {"weights": ["as-is", "int8-g16"], "methods": [{"name": "dense"}, {"name": "teal"}]}
    suite["latency"] = {"prompt": 8, "decoded_tokens": 8, "generate": False, "cpu": {"models": ["tiny"]}}
    folder = LatencyRun(Suite.model_validate(suite), Options(tmp_path), Console(quiet=True)).run()
    decoded = pd.read_csv(folder / "decode.csv")
    plain, coded = decoded[decoded.weight_format.isna()], decoded[decoded.weight_format == "int8-g16"]
    assert "reason" not in decoded
    assert len(plain) == len(coded) == 2
    assert plain[["own_dense_p20", "speedup_all", "kernels", "bits_read"]].isna().to_numpy().all()
    assert set(coded.kernels) == {"2 int8-g16"}
    assert coded.bits_read.to_numpy() == pytest.approx(9.0 * (1.0 - coded.byte_sparsity.to_numpy()), rel=1e-4)
    linears, rest = decode.weight_bytes(random_models.random_model("tiny", torch.float32, "cpu"))
    wanted = linears * coded.bits_read / 32 + rest
    assert coded.bytes_per_token.to_numpy() == pytest.approx(wanted.to_numpy(), rel=1e-4)
    raw = pd.read_parquet(folder / "decode-raw.parquet")
    assert raw[raw.weight_format == "int8-g16"].raw_sparse.map(len).eq(8).all()
    latency_tables.write(folder)
    text = (folder / "README.md").read_text()
    assert "tiny shape (random weights, then int8-g16)" in text
    assert "Ratios are over the fastest path of weights as they are. From codes with nothing at rest a token" in text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            "int3-g16",
            "--weights int3-g16: there is no CPU kernel for int3-g16; allowed: symmetric codes of 8 or 4 bits",
        ),
        ("int8-g16-zero", "--weights int8-g16-zero: there is no CPU kernel"),
        ("int8-g16-gptq", "does not depend on how codes were found; allowed: int8-g16"),
        (
            "int8-g16-head",
            "which does not divide the 97 of the output layer; allowed for this model: a group that divides",
        ),
        ("int8-g128", "weight format 'int8-g128' is called 'int8'"),
        ("int8", "has a scale for every 128 outputs, which does not divide"),
    ],
)
def test_formats_that_a_cpu_cannot_time_are_refused(weights, message, tmp_path):
    latency = {"prompt": 8, "decoded_tokens": 8, "cpu": {"models": ["tiny"]}}

    def run():
        suite = Suite.model_validate(TINY_LATENCY | {"weights": [weights], "latency": latency})
        LatencyRun(suite, Options(tmp_path), Console(quiet=True)).run()

    with pytest.raises((BenchmarkError, ValueError), match=re.escape(message)):
        run()
    assert not list(tmp_path.iterdir())


def test_plans_that_read_no_codes_have_a_reason(tmp_path):
    """Masks of neurons copy rows and columns of weights: their time would not be that of the format."""
    methods = [{"name": "dense"}, {"name": "static-neurons", "targets": [0.25]}]
    latency = {"prompt": 8, "decoded_tokens": 8, "generate": False, "cpu": {"models": ["tiny"]}}
    suite = TINY_LATENCY | {"weights": ["int8-g16"], "methods": methods, "latency": latency}
    folder = LatencyRun(Suite.model_validate(suite), Options(tmp_path), Console(quiet=True)).run()
    (reason,) = pd.read_csv(folder / "decode.csv").reason
    assert reason.startswith("codes are read by the step of a whole model alone")


@pytest.mark.parametrize("name", ["int8-g16", "int8-g16-head"])
def test_bytes_of_a_step_from_codes(name):
    """Two models of float32: codes with scales of 9 bits, and an output layer of 32 bits or in the same codes."""
    dense = build("llama")
    model = SimpleNamespace(dense=dense, format=Format.parse(name), plan=lambda _: None, without_biases=lambda *_: None)
    times = {"dense": [0.04] * 5, "sparse": [0.02] * 5, "sparsity": 0.5, "bits": 4.5, "own_dense": 0.03, "forms": "3"}
    times |= {"prefill_dense": [1.0], "prefill_sparse": [1.0]}
    cell = SimpleNamespace(policy=AllButFirst(1))
    row = decode_rows.measured(model, SimpleNamespace(times=lambda *_: times), cell)
    linears, rest = decode.weight_bytes(dense)
    head = dense.lm_head.weight.nbytes
    stored = head * 9 / 32 if "head" in name else head
    assert row["bytes_per_token"] == pytest.approx(linears * 4.5 / 32 + rest - head + stored, abs=1)
    assert row["limit"] == pytest.approx((linears + rest) / row["bytes_per_token"])
    assert (row["bits_read"], row["own_dense_p20"], row["kernels"]) == (4.5, 0.03, "3")
