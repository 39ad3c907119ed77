"""Writes the report of a suite of quality from its results.csv, windows.parquet, items.parquet and provenance.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks import again
from resting.benchmarks.cells.ranking import unranked
from resting.benchmarks.cells.suite import Tokens
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.names import slug
from resting.benchmarks.report import beginnings, export, notes, tables, task_tables
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report.compared import formats_against_time, literature, ranking, seeds, weights
from resting.benchmarks.report.plots import quality as plots
from resting.benchmarks.report.table import Part


def write(folder: Path) -> None:
    """Write README.md, tables and plots into `folder`.

    Raises
    ------
    BenchmarkError
        If the folder holds no results of a suite of quality.
    """
    facts = folders.read_facts(folder)
    if facts.keys() == folders.STUDY_FACTS:
        raise BenchmarkError(
            f"{folder} holds a study, whose report `resting study` writes; allowed: results of a suite"
        )
    if facts.keys() != folders.FACTS:
        raise BenchmarkError(f"{folder} was written by an older version: run `resting run {folder.name}` again")
    frame = folders.read_results(folder)
    windows = _singles(folder / "windows.parquet", bool(facts["suite"]["evaluation"]["texts"]))
    items = _singles(folder / "items.parquet", bool(facts["suite"].get("tasks")))
    suite, named = facts["suite"], facts["models"]
    parts: list[Part] = [f"# {suite['title']}", suite["description"].strip(), _setting(facts, _counts(windows, suite))]
    main = _own_policy(suite)
    formats = weights.compared(frame[frame.tokens == main], windows[windows.tokens == main], facts)
    parts += weights.sections(formats, folder) + formats_against_time.of_quality(formats, facts, folder)
    for model in named:
        own = frame[frame.model == model["name"]]
        parts += [f"# {model['name']}"] if len(named) > 1 else []
        prefix = f"{slug(model['name'])}-" if len(named) > 1 else ""
        singles = windows[windows.model == model["name"]], items[items.model == model["name"]]
        title = model["name"] if len(named) > 1 else suite["title"]
        parts += _model(own, *singles, facts, model["name"], title, folder, prefix)
    parts += tables.published(frame, suite.get("published", []))
    parts += _literature(frame, suite)
    parts.append(_provenance(facts, folder.name))
    parts += notes.section(folder)
    export.write(folder, parts)


def _literature(frame: pd.DataFrame, suite: dict[str, Any]) -> list[Part]:
    """Set published figures beside the rows of the suite's own token policy."""
    if not suite.get("literature"):
        return []
    of = frame[frame.tokens == _own_policy(suite)]
    measured = {name: _lookup(of[of.model == name]) for name in of.model.unique()}
    models = [suite["model"]] if isinstance(suite["model"], str) else suite["model"]
    return literature.sections(suite["literature"], models, measured)


def _own_policy(suite: dict[str, Any]) -> str:
    return str(Tokens(**_known(suite["tokens"])).build())


def _lookup(frame: pd.DataFrame) -> literature.Measured:
    def get(method: str, figure: literature.Figure) -> tuple[float, float] | None:
        return tables.value_of(frame, method, figure.sparsity, figure.metric)

    return get


def _named(model: dict[str, str]) -> str:
    return f"{model['name']} (sha256 {model['sha256'][:12]})"


def _singles(file: Path, is_there: bool) -> pd.DataFrame:
    return folders.read_singles(file) if is_there else folders.no_singles(file.name)


def _model(
    frame: pd.DataFrame,
    windows: pd.DataFrame,
    items: pd.DataFrame,
    facts: dict[str, Any],
    model: str,
    title: str,
    folder: Path,
    prefix: str,
) -> list[Part]:
    """Write the sections on one model, below the heading `title`.

    Tables and plot are of the suite's own token policy.
    """
    suite = facts["suite"]
    cells = [cell for cell in facts["cells"] if cell["model"] == model]
    policies = list(dict.fromkeys(cell["tokens"] for cell in cells))
    # A method under its authors' protocol has a policy of its own, and is shown with the others.
    further = [str(Tokens(**_known(table)).build()) for table in suite.get("policies", [])]
    main = [name for name in policies if name not in further]
    shown, by_window = frame[frame.tokens.isin(main)], windows[windows.tokens.isin(main)]
    texts = [t for t in suite["evaluation"]["texts"] if shown[shown.metric == f"{t}_perplexity"].value.notna().any()]
    several, said = seeds.sentence(shown), f"{model}, {suite['dtype']}"
    parts: list[Part] = [several] if several else []
    if texts:
        losses = (
            analysis.losses(by_window, texts, unranked(shown[shown.dataset.isin(texts)]))
            if len(main) == 1
            else pd.DataFrame()
        )
        single = by_window if len(main) == 1 else None
        parts += plots.pictures(shown, losses, single, texts, said, folder, prefix, suite.get("reference"))
        parts += [] if losses.empty else [tables.losses(losses, title, _scored(shown, texts))]
        if (reference := suite.get("reference")) and len(main) == 1:
            found = analysis.reference_shares(by_window, texts, reference)
            parts += tables.reference_shares(found, reference, title)
        if suite.get("ranking"):
            parts += _rankings(frame, windows, texts, [*main, *further], suite.get("reference"))
    if suite.get("tasks") and len(main) == 1:
        parts += task_tables.sections(shown, items[items.tokens.isin(main)], cells, said, folder, prefix)
    for text in texts:
        spread = f"Perplexity ± standard error over windows{' and seeds' * bool(several)}."
        parts += [
            f"## {text}",
            tables.values(shown, f"{text}_perplexity", text, spread),
            tables.values(shown, f"{text}_kl", text, "KL(dense ‖ sparse), nats a token."),
            *tables.shares(by_window, text),
        ]
    if further and len(main) == 1:
        parts += tables.policies(windows, texts, [*main, *further], frame) if texts else []
        parts += task_tables.policies(items, cells, [*main, *further])
    parts += tables.allocations([c for c in cells if c["tokens"] in main])
    parts += tables.refined([c for c in cells if c["tokens"] in main])
    parts += tables.splits([c for c in cells if c["tokens"] in main])
    parts += tables.sparsities(shown, frame[frame.tokens.isin(further)], texts)
    parts += tables.folded(shown, texts) + tables.on_dense(shown, texts)
    return parts + tables.reasons(frame) + tables.not_ranked(frame)


def _rankings(
    frame: pd.DataFrame, windows: pd.DataFrame, texts: list[str], policies: list[str], reference: str | None
) -> list[Part]:
    """Rank all methods under every token policy, the suite's own first."""
    parts: list[Part] = []
    for number, policy in enumerate(policies):
        title = "Ranking" if number == 0 else f"Ranking under {policy}"
        own = windows[windows.tokens == policy]
        parts += ranking.sections(frame[frame.tokens == policy], own, texts, reference, title)
    return parts


def _scored(rows: pd.DataFrame, texts: list[str]) -> int:
    """Count the tokens that every method is scored on, over all `texts`."""
    by_text = rows[rows.metric.isin([f"{text}_perplexity" for text in texts])].groupby("dataset").n.max()
    return int(by_text.sum())


def _known(table: dict[str, Any]) -> dict[str, Any]:
    return {key: table[key] for key in Tokens.model_fields if key in table}


def _counts(windows: pd.DataFrame, suite: dict[str, Any]) -> dict[str, int]:
    """Count the windows of every text that were measured."""
    texts = {text: windows[windows.metric == f"{text}_nll"] for text in suite["evaluation"]["texts"]}
    return {text: int(of.window.nunique()) for text, of in texts.items()}


def _setting(facts: dict[str, Any], counts: dict[str, int]) -> str:
    suite = facts["suite"]
    calibration = suite["calibration"]
    tokens = suite["tokens"]
    policy = {
        "all-but-first": f"All tokens of a window but the first {tokens['n']}".removesuffix(" 1"),
        "last-fraction": f"The last {tokens['fraction']:g} of the tokens of a window",
        "decode-only": f"All tokens of a window after a prompt of {tokens.get('prompt')}",
    }[tokens["policy"]]
    named = ", ".join(_named(m) for m in facts["models"])
    return (
        f"{named}, {suite['dtype']}. {beginnings.sentences(facts, counts)}{policy} are sparse. Methods are fitted on "
        f"the calibration documents of {calibration['text']}, and evaluated on other documents. A target is the share "
        "of the block linears' weight bytes that a token leaves unread; what a method adds is counted against it. "
        "Every method meets it as *measured*, on calibration documents of "
        f"{' and '.join(calibration['matching_texts'])}."
    )


def _provenance(facts: dict[str, Any], folder: str) -> str:
    cells, machines = facts["cells"], facts["machines"]
    ratios: dict[int, float] = {}  # a time of one machine is none of another's
    for cell in cells:
        if "masked_over_dense" in cell:
            ratios.setdefault(cell.get("measured_on", 0), cell["masked_over_dense"])
    costs = [f"{ratio:.2f}{_on(machines, i)}" for i, ratio in ratios.items()]
    cost = (
        f" A masked forward costs {', '.join(costs)} times a dense one (median of interleaved runs)." if costs else ""
    )
    where = "; ".join(dict.fromkeys(_machine(m) for m in machines)) or "no machine that is known"
    return (
        f"## Provenance\n\nMeasured in {sum(c['seconds'] for c in cells) / 60:.1f} minutes on {where}.{cost} "
        "Hashes, versions and the time of every cell: `provenance.json`. "
        f"Again: `{again.command(facts, folder)}`."
    )


def _on(machines: list[dict[str, Any]], index: int) -> str:
    """Name the processor that a time is of, where cells were measured on different ones."""
    return f" (on {_processor(machines[index])})" if len({_processor(one) for one in machines}) > 1 else ""


def _processor(facts: dict[str, Any]) -> str:
    device = facts.get("device", "cpu")
    return str(facts.get("cpu", "a processor that is not known") if device == "cpu" else device)


def _machine(facts: dict[str, Any]) -> str:
    if not {"git", "packages", "cpu", "device"} <= facts.keys():  # of a worker that died
        return "a machine that is not known"
    git, packages = facts["git"], facts["packages"]
    processor = _processor(facts)
    count = facts["threads"]
    threads = f"{count} thread{'s' * (count != 1)}, " if count is not None else ""
    return (
        f"{processor} ({facts['cores']} cores, {threads}OMP_WAIT_POLICY={facts['omp_wait_policy']}), "
        f"torch {packages['torch']}, transformers {packages['transformers']}, commit "
        f"{(git['commit'] or 'unknown')[:12]}{' with changes' if git['dirty'] else ''}"
    )
