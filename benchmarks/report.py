"""From a folder's results.csv, windows.parquet and provenance.json to its README and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from benchmarks import analysis, cache, plots
from benchmarks.errors import BenchmarkError


def write(folder: Path) -> None:
    """Write README.md, perplexity.png and perplexity.svg into `folder`.

    Raises
    ------
    BenchmarkError
        If the folder holds no results.
    """
    try:
        frame = pd.read_csv(folder / "results.csv")
        windows = pd.read_parquet(folder / "windows.parquet")
        facts = json.loads((folder / "provenance.json").read_text())
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"no results in {folder}: run `resting run {folder.name}` first ({error})") from error
    suite = facts["suite"]
    texts = [t for t in suite["evaluation"]["texts"] if frame[frame.metric == f"{t}_perplexity"].value.notna().any()]
    parts = [f"# {suite['title']}", suite["description"].strip(), _setting(facts)]
    if texts:
        plots.perplexity(frame[frame.value.notna()], texts, f"{facts['model']['name']}, {suite['dtype']}", folder)
        parts.append("![Perplexity against measured byte sparsity](perplexity.png)")
    for text in texts:
        parts += [
            f"## {text}",
            "Perplexity ± standard error over windows.",
            _values(frame, f"{text}_perplexity"),
        ]
        parts += ["KL(dense ‖ sparse), nats a token.", _values(frame, f"{text}_kl")]
        parts += _shares(windows, text)
    parts += _sparsities(frame, texts) + _folded(frame, texts) + _reasons(frame) + [_provenance(facts)]
    cache.write_whole(folder / "README.md", "\n\n".join(parts) + "\n")


def _setting(facts: dict[str, Any]) -> str:
    suite = facts["suite"]
    evaluation, calibration = suite["evaluation"], suite["calibration"]
    count = "all" if evaluation["windows"] is None else f"a seeded sample of {evaluation['windows']}"
    tokens = suite["tokens"]
    policy = {
        "all-but-first": f"all tokens of a window but the first {tokens['n']}".removesuffix(" 1"),
        "last-fraction": f"the last {tokens['fraction']:g} of a window",
        "decode-only": "decoded tokens only",
    }[tokens["policy"]]
    return (
        f"{facts['model']['name']}, {suite['dtype']}. Windows of {evaluation['window']} tokens "
        f"without overlap, {count} a text. Sparse are {policy}. Fitted on the calibration documents of "
        f"{calibration['text']}; evaluated on other documents. A target is the share of the block linears' "
        "weight bytes that a token leaves unread, what a method adds counted against it; every method meets it as "
        f"*measured*, on calibration documents of {' and '.join(calibration['matching_texts'])}."
    )


def _values(frame: pd.DataFrame, metric: str) -> str:
    rows = frame[(frame.metric == metric) & frame.value.notna()]
    targets = sorted(t for t in rows.target_sparsity.unique() if t > 0)
    table = []
    for method in rows.method.unique():
        of = rows[rows.method == method]
        line: list[str] = [method]
        for target in [0.0] if method == "dense" else targets:
            at = of[of.target_sparsity == target]
            line.append(_cell(at))
        if method == "dense":
            line = [method, *[line[1]] * max(1, len(targets))]
        table.append(line)
    return _markdown(table, ["", *(f"{t:.2f}" for t in targets)])


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    value = rows.value.mean()
    # One seed: the spread over windows. Several: the spread over seeds.
    error = rows.stderr.iloc[0] if len(rows) == 1 else rows.value.sem()
    digits = 3 if value < 10 else 2 if value < 100 else 0
    return f"{value:.{digits}f}" if pd.isna(error) else f"{value:.{digits}f} ± {error:.{digits}f}"


def _shares(windows: pd.DataFrame, text: str) -> list[str]:
    parts = []
    for metric, name in (("nll", "nats"), ("kl", "KL")):
        table = analysis.shares(windows, text, metric)
        if not table.empty:
            rows = [
                [m, *("" if not isinstance(s, analysis.Share) else _mark(s) for s in table.loc[m])] for m in table.index
            ]
            parts.append(
                f"Share of the bare sparsifier's gap to dense that is recovered, in {name}, with the 95 % interval of "
                "a paired bootstrap over windows."
            )
            parts.append(_markdown(rows, ["", *(f"{t:.2f}" for t in table.columns)]))
    return parts


def _mark(share: analysis.Share) -> str:
    return f"{share} (within noise)" if share.within_noise else str(share)


def _sparsities(frame: pd.DataFrame, texts: list[str]) -> list[str]:
    rows = frame[frame.metric.isin([f"{t}_perplexity" for t in texts]) & (frame.target_sparsity > 0)]
    if rows.empty:
        return []
    table = rows.pivot_table("byte_sparsity", ["method", "text"], "target_sparsity", sort=False)
    table = table[sorted(table.columns)]
    lines = [[m, t, *(f"{v:.4f}" for v in line)] for (m, t), line in zip(table.index, table.to_numpy())]
    off = (rows.byte_sparsity - rows.target_sparsity).abs()
    worst = rows.loc[off.idxmax()]
    return [
        "## Measured byte sparsity",
        f"On the evaluation text. The largest distance from a target is {off.max():.4f} "
        f"({worst.method} at {worst.target_sparsity:g} on {worst.text}).",
        _markdown(lines, ["method", "text", *(f"{t:.2f}" for t in table.columns)]),
    ]


def _folded(frame: pd.DataFrame, texts: list[str]) -> list[str]:
    lines = []
    for text in texts:
        for row in frame[frame.metric == f"{text}_perplexity_folded"].itertuples():
            same = frame[(frame.metric == f"{text}_perplexity") & (frame.method == row.method)]
            same = same[(same.target_sparsity == row.target_sparsity) & (same.seed == row.seed)]
            values = [
                f"{same.value.iloc[0]:.4f}",
                f"{row.value:.4f}",
                f"{row.value - same.value.iloc[0]:+.4f}",
            ]
            lines.append([row.method, f"{row.target_sparsity:.2f}", text, *values])
    if not lines:
        return []
    return [
        "## Folded biases",
        "A plan's bias acts on the tokens its masks act on. In an exported model it stands in the linear layer and "
        "acts on every token, the dense first one too. Perplexity in both forms:",
        _markdown(lines, ["method", "target", "text", "plan", "folded", "difference"]),
    ]


def _reasons(frame: pd.DataFrame) -> list[str]:
    rows = frame[frame.reason.notna()]
    if rows.empty:
        return []
    lines = [[r.method, f"{r.target_sparsity:.2f}", r.metric, r.reason] for r in rows.itertuples()]
    return ["## Not measured", _markdown(lines, ["method", "target", "metric", "reason"])]


def _provenance(facts: dict[str, Any]) -> str:
    cells, machines = facts["cells"], facts["machines"]
    ratio = next((c["masked_over_dense"] for c in cells if "masked_over_dense" in c), None)
    cost = f" A masked forward costs {ratio:.2f} times a dense one (median of interleaved runs)." if ratio else ""
    where = "; ".join(_machine(m) for m in machines)
    return (
        f"## Provenance\n\nMeasured in {sum(c['seconds'] for c in cells) / 60:.1f} minutes on {where}.{cost} "
        "Hashes, versions and the time of every cell: `provenance.json`. "
        f"Again: `resting run {facts['suite']['name']}`."
    )


def _machine(facts: dict[str, Any]) -> str:
    git, packages = facts["git"], facts["packages"]
    processor = facts["cpu"] if facts["device"] == "cpu" else facts["device"]
    return (
        f"{processor} ({facts['cores']} cores, {facts['threads']} threads, "
        f"OMP_WAIT_POLICY={facts['omp_wait_policy']}), "
        f"torch {packages['torch']}, transformers {packages['transformers']}, commit "
        f"{(git['commit'] or 'unknown')[:12]}{' with changes' if git['dirty'] else ''}"
    )


def _markdown(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
