"""Compares what a sparse model writes with what the dense one writes, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.quality import limits
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.perplexity import mean_and_error
from resting.benchmarks.quality.plans import fitted
from resting.benchmarks.report.plots import plt, save
from resting.benchmarks.report.style import styles
from resting.benchmarks.report.table import markdown, shown_target
from resting.benchmarks.studies.study import Study, write
from resting.sparsifier import DecodeOnly, OnProgress, Plan, SparsifierError, TokenPolicy
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.logits import final_hidden, logits

NEW = 256
"""Tokens that are written after each prompt."""
GRAM = 4
"""Consecutive tokens that make a repetition where they occurred before in what was written."""
CHUNK = 256
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class Prompts:
    """Holds prompts of one text with what the dense model writes after them.

    Attributes
    ----------
    name : str
        Of the text.
    ids : Tensor [prompts, length]
    dense : Tensor [prompts, new]
        The likeliest token at every step.
    lengths : list of int
        How many of them count: those up to the first that ends a text, and that one.
    """

    name: str
    ids: Tensor
    dense: Tensor
    lengths: list[int]


@torch.no_grad()
def written(model: Any, prompts: Tensor, new: int) -> Tensor:
    """Write `new` tokens after each prompt with the model as it is now, the likeliest every time: [prompts, new].

    Parameters
    ----------
    prompts : Tensor [prompts, length]
    """
    device = next(model.parameters()).device
    ids, cache, found = prompts.to(device), None, []
    for _ in range(new):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True).to(device)
        found.append(ids)
    return torch.cat(found, 1).cpu()


@torch.no_grad()
def following(model: Any, prompts: Tensor, continuation: Tensor) -> Tensor:
    """Return the likeliest token after the prompt and after every token of a given continuation but its last.

    Everything goes through the model at once: under a plan the token policy must say where the prompt ends.

    Parameters
    ----------
    prompts : Tensor [prompts, length]
    continuation : Tensor [prompts, new]

    Returns
    -------
    Tensor [prompts, new]
    """
    ids = torch.cat([prompts, continuation[:, :-1]], 1).to(next(model.parameters()).device)
    hidden = final_hidden(model, ids)[:, prompts.shape[1] - 1 :]
    return torch.stack([torch.cat([logits(model, s).argmax(-1) for s in row.split(CHUNK)]) for row in hidden]).cpu()


def counted(continuation: Tensor, ends: set[int]) -> list[int]:
    """Return how many tokens of each continuation count: up to the first that ends a text, with it."""
    rows = continuation.tolist()
    return [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]


def repeated(tokens: list[int]) -> float:
    """Return the share of runs of `GRAM` tokens that occurred before; 0 where there is none."""
    runs = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def compared(dense: list[int], free: list[int], forced: list[int], ends: set[int]) -> dict[str, Any]:
    """Compare one continuation with the dense model's, over the tokens of `dense`.

    Parameters
    ----------
    dense : list of int
        What the dense model wrote, as far as it counts.
    free : list of int
        What the sparse model wrote by itself, at least as long.
    forced : list of int
        What it takes for the likeliest after each beginning of `dense`.

    Returns
    -------
    dict
        A row's numbers. `counted` tokens of the dense model's are compared. `same` of the first are equal before the
        first that differs; `agreement` is the share of equal tokens given the dense model's own text, in its first and
        last quarter as well; `free_agreement` that of what it writes by itself; `length` counts the tokens of that up
        to the end of its text.
    """
    count, quarter = len(dense), max(1, len(dense) // 4)
    equal = [a == b for a, b in zip(dense, forced)]
    kept = [a == b for a, b in zip(dense, free)]
    own = free[: next((i + 1 for i, token in enumerate(free) if token in ends), len(free))]
    return {
        "counted": count,
        "same": next((i for i, good in enumerate(kept) if not good), count),
        "agreement": sum(equal) / count,
        "agreement_first": sum(equal[:quarter]) / quarter,
        "agreement_last": sum(equal[-quarter:]) / quarter,
        "free_agreement": sum(kept) / count,
        "length": len(own),
        "repeated": repeated(own),
        "dense_repeated": repeated(dense),
    }


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ends = set(found if isinstance(found, list) else [found]) | {tokenizer.eos_token_id}
    return {token for token in ends if token is not None}


def prompts_of(loaded: LoadedModel, new: int) -> Iterator[Prompts]:
    """Write with the dense model after the evaluation windows of every text of the suite.

    Raises
    ------
    SuiteError
        If window and new tokens are more than the model has positions for.
    """
    config = loaded.suite.evaluation
    limit = limits.positions(loaded.model.config)
    if limit is not None and config.window + new > limit:
        raise SuiteError(
            f"evaluation.window = {config.window}: with {new} tokens written after it that is beyond the context of "
            f"{limit}; allowed: up to {limit - new}"
        )
    ends = ends_of(loaded.model, loaded.tokenizer)
    for name in config.texts:
        ids = loaded.reference(name).windows
        with evaluating(loaded.model):
            batches = ids.split(config.batch_size)
            dense = torch.cat([written(loaded.model, batch, new) for batch in batches])
        loaded.on_progress("dense text", 1, 1, name)
        yield Prompts(name, ids, dense, counted(dense, ends))


def measure(loaded: LoadedModel, cells: list[Cell], new: int, skipped: Callable[[str], None] = print) -> pd.DataFrame:
    """Compare what the cells' plans write with what the dense model writes, under two token policies.

    Returns
    -------
    DataFrame
        A row per method, target, seed, policy, text and prompt, with the numbers of `compared`. The dense model's rows
        say what rounding alone does: it reads its own text at once, where it wrote it token by token.
    """
    config, rows = loaded.suite.evaluation, []
    ends = ends_of(loaded.model, loaded.tokenizer)
    known = list(prompts_of(loaded, new))
    policies = [cells[0].policy, DecodeOnly(config.window)]
    for cell in cells:
        try:
            plan = fitted(loaded, cell)
        except SparsifierError as error:  # above a ceiling, say: no row
            skipped(f"{cell.label} at {cell.target:g}: {error}")
            continue
        for policy in policies[:1] if plan.is_dense else policies:
            for number, of in enumerate(known):
                try:
                    found = _of_text(loaded, plan, policy, of, ends)
                except SparsifierError as error:  # a mask of the prompt, where it is sparse as well
                    skipped(f"{cell.label} at {cell.target:g} under {policy}: {error}")
                    break
                at = {"method": cell.label, "target": cell.target, "seed": cell.seed, "tokens": str(policy)}
                rows += [at | {"dataset": of.name, "prompt": i} | one for i, one in enumerate(found)]
                loaded.on_progress(f"text of {cell.label}", number + 1, len(known), str(policy))
    if not any(row["method"] != "dense" for row in rows):
        raise SuiteError("the study of writing needs a suite with a sparsifier that can be fitted")
    return pd.DataFrame(rows)


def _of_text(loaded: LoadedModel, plan: Plan, policy: TokenPolicy, of: Prompts, ends: set[int]) -> list[dict[str, Any]]:
    rows, size, new = [], loaded.suite.evaluation.batch_size, of.dense.shape[1]
    with evaluating(loaded.model), plan.applied(loaded.model, policy):
        for start in range(0, len(of.ids), size):
            ids, dense = of.ids[start : start + size], of.dense[start : start + size]
            free = dense if plan.is_dense else written(loaded.model, ids, new)
            forced = following(loaded.model, ids, dense)
            for i, count in enumerate(of.lengths[start : start + size]):
                rows.append(compared(dense[i, :count].tolist(), free[i].tolist(), forced[i].tolist(), ends))
    return rows


def run(study: Study, on_progress: OnProgress) -> Path:
    """Measure, and write table and plot into ``OUTPUT/SUITE-writing``."""
    frame = measure(study.loaded(on_progress), study.cells(), NEW)
    folder = study.folder("writing")
    window, texts = study.suite.evaluation.window, ", ".join(study.suite.evaluation.texts)
    about = (
        f"What a sparse model writes after prompts of {window} tokens of {texts}, beside the dense model: {NEW} "
        "tokens, the likeliest every time, as far as the dense model's text goes. "
        "*Same* counts the tokens before the first that differs. "
        "*Agreement* is the share of tokens that are the dense model's, given the dense model's own text so far, with "
        "its first and its last quarter; *by itself* that of the text which the sparse model writes on its own. "
        "*Repeated* is the share of runs of four tokens that occurred before in that text. "
        "Under the policy decode-after the prompt is dense. Means over prompts, with standard errors."
    )
    parts = [about, "![How many texts are still the dense model's](writing.png)", summary(frame)]
    _plot(frame, folder, study.title)
    return write(study, "writing", "What sparse models write", parts, frame)


def summary(frame: pd.DataFrame) -> str:
    """Return a table of the means over prompts and texts."""
    lines = []
    for (method, target, tokens), of in frame.groupby(["method", "target", "tokens"], sort=False):
        of = of.groupby(["dataset", "prompt"]).mean(numeric_only=True)  # seeds are no prompts of their own
        is_dense = method == "dense"

        def mean(name: str, places: int, of: pd.DataFrame = of) -> str:
            value, error = mean_and_error(of[name].to_numpy(dtype=float))
            return f"{value:.{places}f}" if np.isnan(error) else f"{value:.{places}f} ± {error:.{places}f}"

        numbers = [mean("agreement", 3), mean("agreement_first", 3), mean("agreement_last", 3)]
        free = ["", "", mean("dense_repeated", 3)] if is_dense else [mean("same", 1), mean("free_agreement", 3)]
        free += [] if is_dense else [mean("repeated", 3)]
        lines.append([str(method), shown_target(float(target)), str(tokens), *numbers, *free])
    headers = ["method", "target", "tokens", "agreement", "first quarter", "last quarter", "same", "by itself"]
    return markdown(lines, [*headers, "repeated"])


def _plot(frame: pd.DataFrame, folder: Path, title: str) -> None:
    """Draw the share of texts that are still the dense model's, by the number of tokens; one panel a policy."""
    sparse = frame[frame.method != "dense"]
    target = max(sparse.target, key=lambda t: (sparse.target == t).sum())
    shown = sparse[sparse.target == target]
    policies = list(shown.tokens.unique())
    looks = {method: look.line for method, look in styles(shown.method.unique()).items()}
    end = max(10, int(shown.same.max()) + 2)  # from there on no text is the same
    figure, axes = plt.subplots(1, len(policies), figsize=(4.4 * len(policies) + 0.6, 3.2), squeeze=False, sharey=True)
    for axis, policy in zip(axes[0], policies):
        for method, of in shown[shown.tokens == policy].groupby("method", sort=False):
            places = np.arange(1, int(of.counted.max()) + 1)
            longer = of.counted.to_numpy()[:, None] >= places  # texts that go so far
            still = (of.same.to_numpy()[:, None] >= places) & longer
            axis.plot(places, still.sum(0) / longer.sum(0), label=method, **looks[str(method)] | {"marker": ""})
        axis.set_title(f"{policy}, at {target:g}", fontsize=10)
        axis.set_xlabel("tokens")
        axis.set_ylim(0, 1)
        axis.set_xlim(0, end)
        axis.grid(axis="y", color="0.9", linewidth=0.6)
    axes[0][0].set_ylabel("texts still the same")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.suptitle(title)
    save(figure, folder, "writing")
