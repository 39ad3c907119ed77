"""Writes the report of a suite of times from its decode.csv, matrices.csv and provenance.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks import again
from resting.benchmarks.names import short, slug
from resting.benchmarks.report import export, notes
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report.compared import formats_against_time, from_codes, quality_against_time
from resting.benchmarks.report.plots import draw, speed
from resting.benchmarks.report.speedups import samples
from resting.benchmarks.report.table import Part, Table, shown_target

MACHINE = "Times are of one machine and one run: compare ratios, and only within a table."


def write(folder: Path, plots: bool = True) -> None:
    """Write README.md, tables and `plots` into `folder`.

    Raises
    ------
    BenchmarkError
        If the folder holds no results of a suite of times.
    """
    facts = folders.read_facts(folder)
    decoded = folders.read_table(folder / "decode.csv", may_be_empty=True)
    kernels = folders.read_table(folder / "matrices.csv", may_be_empty=True)
    suite = facts["suite"]
    parts: list[Part] = [f"# {suite['title']}", suite["description"].strip(), MACHINE]
    if not decoded.empty:
        if plots:
            by_format = formats_against_time.of_times(decoded, facts, folder)
            parts += by_format or quality_against_time.parts(decoded, suite, folder, facts["measured_on"])
        parts += _decoded(decoded, facts, folder, plots)
    if not kernels.empty:
        parts += _matrices(kernels, facts.get("copy_bandwidth"))
        device = "cpu" if facts["measured_on"]["device"] == "cpu" else "cuda"
        named = (suite["latency"][device] or {}).get("matrices", [])
        if missing := [name for name in named if name not in set(kernels.matrix)]:
            parts.append(f"Named in the suite and not reached before the run was ended: {', '.join(missing)}.")
    parts += from_codes.sections(folder)
    on = facts["measured_on"]
    where = f"{on['cpu']} ({on['cores']} cores, OMP_WAIT_POLICY={on['omp_wait_policy']})"
    if on["device"] != "cpu":
        facts_of = ", ".join(f"{name} {value}" for name, value in on["gpu"].items() if name != "name")
        where = f"{on['device']} ({facts_of})"
    names = ("torch", "numba" if on["device"] == "cpu" else "triton", "transformers")
    versions = ", ".join(f"{name} {on['packages'].get(name)}" for name in names)
    commit = (on["git"]["commit"] or "unknown")[:12] + (" with changes" if on["git"]["dirty"] else "")
    parts += ["## Provenance", f"{where}, {versions}, commit {commit}. Again: `{again.command(facts)}`."]
    parts += notes.section(folder)
    export.write(folder, parts)


def _decoded(frame: pd.DataFrame, facts: dict[str, Any], folder: Path, plots: bool) -> list[Part]:
    table = facts["suite"]["latency"]
    parts: list[Part] = [
        "## Decoding",
        f"{table['decoded_tokens']} tokens after a prompt of {table['prompt']}, batch 1, every step timed, the dense "
        "and the sparse model in turn on the same tokens. Dense is the fastest of the ways listed. In the tables: the "
        "dense time over the sparse one (20th percentiles), and in brackets its share of the model's limit, the bytes "
        "that a dense step reads over those of a sparse one; what is not a block linear is read by both.",
    ]
    drawn = samples(folder) if plots else {}
    for (model, dtype, threads), group in frame.groupby(["model", "dtype", "threads"], sort=False):
        done = group[group.speedup.notna()] if "speedup" in group else group.iloc[:0]
        if done.empty:
            continue
        title, caption = f"{model}, {dtype}, {threads} thread{'s' * (threads > 1)}", ""
        parts.append(f"### {title}")
        where = ", ".join([str(dtype), *_format(done), f"{threads} threads"])
        tried = next(
            (t for key, t in facts["dense_paths"].items() if f", {where}" in key and model.startswith(_stem(key))),
            None,
        )
        if tried:
            caption = f"Dense paths, a token: {_paths(tried['seconds'])}. Dense below is **{tried['fastest']}**."
        targets = sorted(done.target.unique())
        lines = []
        for method in done.method.unique():
            of = done[done.method == method].set_index("target")
            lines.append([method, *(_ratio(of.loc[t]) if t in of.index else "" for t in targets)])
        parts.append(Table(title, caption, ["", *(shown_target(t) for t in targets)], lines))
        parts += _of_all(done)
        parts += _generated(done, tried, title, targets)
        columns = ["", "target", "byte sparsity", "ms p20", "p50", "p99", "dense p20", "tokens/s", "MB read", "GB/s"]
        forms = "kernels" in done and bool(done.kernels.notna().any())
        prompts = bool(done.prefill_sparse.notna().any())
        digits = 1 if done.dense_p20.min() > 0.01 else 3
        details = [
            [
                row.method,
                shown_target(row.target),
                f"{row.byte_sparsity:.3f}",
                *(f"{1e3 * v:.{digits}f}" for v in (row.sparse_p20, row.sparse_p50, row.sparse_p99, row.dense_p20)),
                f"{row.tokens_per_second:.1f}",
                f"{row.bytes_per_token / 1e6:.0f}",
                f"{row.bandwidth / 1e9:.1f}",
                *(f"{1e3 * v:.0f}" for v in (row.prefill_sparse, row.prefill_dense) if prompts),
                *([row.kernels] if forms else []),
            ]
            for row in done.itertuples()
        ]
        heads = columns + ["prompt, ms", "dense"] * prompts + ["blocks"] * forms
        parts.append(Table(title, "", heads, details))
        if "over_base" in done and done.over_base.notna().any():
            costs = [
                f"{r.method} at {shown_target(r.target)} {r.over_base:.3f}"
                for r in done.itertuples()
                if r.over_base > 0
            ]
            parts.append(
                f"Time of a token over that of the same masks without the biases, in turn: {', '.join(costs)}."
            )
        parts.append(
            "A sparse prompt is not faster: it goes through the masks and a dense product."
            if prompts
            else "Prompts are not timed: a sparse one goes through the masks and a dense product, and is not faster."
        )
        if len(targets) > 1 and plots:
            chart = speed.decode_chart(done, facts["measured_on"], drawn)
            name = draw.write(chart, folder, f"decode-{slug(short(model))}-{dtype}-{threads}")
            parts.append(f"![Speed against measured byte sparsity]({name})")
    if "reason" in frame and frame.reason.notna().any():
        lines = [
            [r.model, r.method, shown_target(r.target), r.reason] for r in frame[frame.reason.notna()].itertuples()
        ]
        parts += ["### Not measured", Table("Not measured", "", ["model", "method", "target", "reason"], lines)]
    if missing := [*_cells_not_reached(frame, facts["suite"]), *_not_reached(facts)]:
        parts.append(f"Named in the suite and not reached before the run was ended: {', '.join(missing)}.")
    return parts


def _of_all(done: pd.DataFrame) -> list[Part]:
    """Say what is over the fastest of all ways, where this project's own step with nothing at rest was timed too."""
    if "speedup_all" not in done or done.speedup_all.isna().all():
        return []
    known = done[done.speedup_all.notna()]
    over = ", ".join(f"{r.method} at {shown_target(r.target)} {r.speedup_all:.2f}" for r in known.itertuples())
    if _format(known) and "own_dense_p20" in known and known.own_dense_p20.notna().all():
        return [
            "Ratios are over the fastest path of weights as they are. From codes with nothing at rest a token takes "
            f"{1e3 * known.own_dense_p20.median():.2f} ms; over the faster of the two: {over}."
        ]
    if bool((known.speedup_all >= known.speedup).all()):
        return [
            "The kernels with nothing at rest are no faster than that path: over the fastest of all ways, ratios are "
            "the same."
        ]
    return [
        "Ratios are over the fastest of all ways but this project's own kernels. With nothing at rest these are dense "
        f"as well, and faster; over the fastest of all ways: {over}."
    ]


def _format(rows: pd.DataFrame) -> list[str]:
    """The format that a model's weights were stored in; nothing where they were as they are."""
    return list(rows.weight_format.dropna().unique()) if "weight_format" in rows else []


def _paths(seconds: dict[str, Any]) -> str:
    shown = [
        f"{name} {1e3 * t:.1f} ms" if isinstance(t, float) else f"{name} does not run ({t})"
        for name, t in seconds.items()
    ]
    return ", ".join(shown)


def _generated(done: pd.DataFrame, tried: dict[str, Any] | None, title: str, targets: list[float]) -> list[Part]:
    """What a user of `generate` gets, where it was timed."""
    if "generate_speedup" not in done or tried is None or done.generate_speedup.isna().all():
        return []
    lines = []
    for method in done.method.unique():
        of = done[done.method == method].set_index("target")
        found = [of.loc[t] if t in of.index else None for t in targets]
        shown = ["" if r is None else f"{r.generate_speedup:.2f} ({r.generate_over_step:.2f})" for r in found]
        lines.append([method, *shown])
    caption = (
        "The same as `model.generate` runs it, greedily, under `decoding`: the dense model's time of a token over the "
        "sparse one's (20th percentiles, in turn), and in brackets the time of a generated token over that of a step. "
        f"Dense paths of `generate`, a token: {_paths(tried['generate_seconds'])}. "
        f"Dense here is **{tried['fastest_generate']}**."
    )
    return [Table(f"{title}, generate", caption, ["", *(shown_target(t) for t in targets)], lines)]


def _cells_not_reached(frame: pd.DataFrame, suite: dict[str, Any]) -> list[str]:
    """How many cells of the last model the run did not come to."""
    wanted = sum(len(of["targets"] or suite["targets"]) for of in suite["methods"] if of["name"] != "dense")
    about = ["model", "dtype", "threads"]
    have = int((frame[about] == frame[about].iloc[-1]).all(axis=1).sum())
    return [f"{wanted - have} of {wanted} cells of {frame.model.iloc[-1]}"] if have < wanted else []


def _not_reached(facts: dict[str, Any]) -> list[str]:
    """Models of the suite that no dense path was tried of."""
    device = "cpu" if facts["measured_on"]["device"] == "cpu" else "cuda"
    named = (facts["suite"]["latency"][device] or {}).get("models", [])
    return [spec for spec in named if not any(key.startswith(f"{spec},") for key in facts["dense_paths"])]


def _stem(key: str) -> str:
    """What a model's key in the suite and its name in rows share."""
    return "SmolLM2" if key.startswith("smollm2") else key.split(",")[0]


def _ratio(row: Any) -> str:
    return f"{row.speedup:.2f} ({100 * row.share:.0f} %)"


def _matrices(frame: pd.DataFrame, copy: float | None) -> list[Part]:
    parts: list[Part] = [
        "## Matrices",
        "One product of one token, on weights from memory (no cache holds them), inputs x outputs. The column kernel "
        "reads the weights of active inputs only; dense is the fastest of `torch.nn.functional.linear` on weights in "
        "the usual order, the same on input-major ones, the kernel with nothing at rest, and on a GPU also the "
        "compiled product and a plain one in Triton, all in CUDA graphs. In the tables: the dense "
        "time over the kernel's (20th percentiles), in brackets its share of 1 / (1 - s). `rows` skips rows of `up` "
        "under a masked gate.",
    ]
    for (dtype, threads), group in frame.groupby(["dtype", "threads"], sort=False):
        title, caption = f"{dtype}, {threads} thread{'s' * (threads > 1)}", ""
        parts.append(f"### {title}")
        sparsities = sorted(s for s in group.sparsity.unique() if s > 0)
        lines = []
        for matrix in group.matrix.unique():
            of = group[group.matrix == matrix]
            linear = of[of.kernel == "linear"].iloc[0]
            best = of[(of.sparsity == 0.0) & (of.speedup > 0.9999)].iloc[0]
            columns = of[(of.kernel == "columns") & (of.sparsity > 0)].set_index("sparsity")
            rows = of[of.kernel == "rows"].iloc[0]
            lines.append(
                [
                    matrix,
                    f"{1e6 * linear.seconds:.0f}",
                    linear.best_dense,
                    f"{1 / linear.speedup:.2f}",
                    *(_ratio(columns.loc[s]) for s in sparsities),
                    f"{_ratio(rows)} at {shown_target(rows.sparsity)}",
                    *(f"{100 * row.bandwidth / copy:.0f} %" for row in (best, columns.loc[0.5]) if copy),
                ]
            )
        heads = ["", "linear, µs", "fastest dense", "times linear", *(shown_target(s) for s in sparsities), "rows"]
        if copy:
            heads += ["dense, of copy", "50 %, of copy"]
            caption = f"Of copy: of the {copy / 1e9:.0f} GB/s, read and written, of a copy on the device."
        parts.append(Table(title, caption, heads, lines))
        parts += _but_this_kernel(group, title, sparsities, copy)
    return parts


def _but_this_kernel(group: pd.DataFrame, title: str, sparsities: list[float], copy: float | None) -> list[Part]:
    """Set the kernel beside the fastest dense product of all ways but itself, where that was written down."""
    if "speedup_other" not in group or group.speedup_other.isna().all():
        return []
    lines = []
    for matrix in group.matrix.unique():
        of = group[group.matrix == matrix]
        for kernel, words in (("columns", ""), ("sums", ", sums left")):
            found = of[(of.kernel == kernel) & (of.sparsity > 0)].set_index("sparsity")
            if not found.empty:
                shown = [_over_other(found.loc[s], copy) if s in found.index else "" for s in sparsities]
                lines.append([f"{matrix}{words}", of.best_other.iloc[0], *shown])
    caption = (
        "The same over the fastest dense product of all ways but this kernel with nothing at rest"
        + (", in brackets the share of copy" if copy else "")
        + "."
        + (
            " Where sums are left, the product is as blocks run it: who reads the sums next makes numbers of them."
            if "sums" in set(group.kernel)
            else ""
        )
    )
    return [Table(f"{title}, other ways", caption, ["", "dense", *(shown_target(s) for s in sparsities)], lines)]


def _over_other(row: Any, copy: float | None) -> str:
    return f"{row.speedup_other:.2f}" + (f" ({100 * row.bandwidth / copy:.0f} %)" if copy else "")
