"""From the seconds of decoded tokens to the row of a cell."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.latency import decode, timing
from resting.benchmarks.latency.record import Row
from resting.benchmarks.latency.timed_model import TimedModel
from resting.sparsifier import Plan, SparsifierError, TokenPolicy


class Timer(Protocol):
    """Times plans of one model against its fastest dense path on a device.

    Attributes
    ----------
    path, generate_path : str
        The fastest dense paths, of a step and of `generate`.
    tried, generate_tried : dict of str to float or str
        Seconds per token of every dense path, or why it did not run.
    """

    path: str
    generate_path: str
    tried: dict[str, float | str]
    generate_tried: dict[str, float | str]

    def times(self, plan: Plan, base: Plan | None, policy: TokenPolicy) -> dict[str, Any]:
        """Decode the same text with the dense and the sparse model, in turn.

        Parameters
        ----------
        plan : Plan
        base : Plan or None
            What `plan` adds to, timed beside it.
        policy : TokenPolicy

        Returns
        -------
        dict
            Raw seconds of every step (``dense``, ``sparse``, ``base``), of the prompts (``prefill_dense``,
            ``prefill_sparse``), of the tokens of `generate` (``generate_dense``, ``generate_sparse``) where these are
            timed, and the ``sparsity`` of the decoded tokens; of a quantised model also the ``bits`` that they read,
            over the weights of the blocks. On a GPU, and of a quantised model, also ``own_dense``, the seconds of this
            project's own step with nothing at rest, and ``forms``, how many blocks run in which form.
        """
        ...


def measured(model: TimedModel, timer: Timer, cell: Cell) -> Row:
    """Time a cell; its row holds the reason instead where it has no plan, or no room in memory."""
    try:
        plan = model.plan(cell)
        times = timer.times(plan, model.without_biases(cell, plan), cell.policy)
    except (SparsifierError, torch.OutOfMemoryError) as error:
        return {"reason": str(error)}
    linears, rest = decode.weight_bytes(model.dense)
    if model.format is None:
        return numbers(times, linears, rest)
    as_is = rest
    if model.format.head:
        head = model.dense.get_output_embeddings().weight
        rest += round(head.numel() * model.format.bits_a_weight / 8) - head.nbytes
    width = 8 * next(model.dense.parameters()).itemsize
    return numbers(times, linears, rest, width, as_is) | {
        "weight_format": model.format.name,
        "bits_a_weight": model.format.bits_a_weight,
    }


def numbers(times: dict[str, Any], linears: int, rest: int, width: int = 16, as_is: int | None = None) -> Row:
    """Compute quantiles, ratios and their limit from raw seconds.

    Parameters
    ----------
    times : dict
        As a `Timer` gives them.
    linears, rest : int
        Bytes that a dense step reads: of the block linears, and of everything else.
    as_is : int, optional
        Of everything else with weights as they are, where the sparse step reads less of it; else `rest`.
    width : int
        Bits of a weight as the dense step reads it; what the sparse step reads is told by the ``bits`` of `times`,
        where codes are read.
    """
    dense, sparse = timing.p20(times["dense"]), timing.p20(times["sparse"])
    share = times["bits"] / width if "bits" in times else 1.0 - times["sparsity"]
    read = linears * share + rest
    speedup, limit = dense / sparse, (linears + (rest if as_is is None else as_is)) / read
    row: Row = {"byte_sparsity": times["sparsity"]}
    for name in ("dense", "sparse"):
        for label, q in (("p20", timing.RATIO_QUANTILE), ("p50", 0.5), ("p99", 0.99)):
            row[f"{name}_{label}"] = timing.quantile(times[name], q)
    row |= {
        "tokens_per_second": 1.0 / timing.quantile(times["sparse"], 0.5),
        "bytes_per_token": read,
        "bandwidth": read / sparse,
        "speedup": speedup,
        "limit": limit,
        "share": speedup / limit,
    }
    if "own_dense" in times:
        row |= {"own_dense_p20": times["own_dense"], "speedup_all": min(speedup, times["own_dense"] / sparse)}
    if "bits" in times:
        row["bits_read"] = times["bits"]
    if "forms" in times:
        row["kernels"] = times["forms"]
    if "generate_sparse" in times:
        row |= _generated(times, sparse)
    if "base" in times:
        row |= {"over_base": sparse / timing.p20(times["base"]), "raw_base": _rounded(times["base"])}
    return row | {
        "prefill_dense": min(times["prefill_dense"]),
        "prefill_sparse": min(times["prefill_sparse"]),
        "raw_dense": _rounded(times["dense"]),
        "raw_sparse": _rounded(times["sparse"]),
    }


def _generated(times: dict[str, Any], step: float) -> Row:
    """Compute what a user of `generate` gets: its own ratio to the dense model's, and what it adds to a step."""
    dense, sparse = (timing.p20(times[f"generate_{name}"]) for name in ("dense", "sparse"))
    return {
        "generate_dense_p20": dense,
        "generate_sparse_p20": sparse,
        "generate_speedup": dense / sparse,
        "generate_over_step": sparse / step,
        "raw_generate_dense": _rounded(times["generate_dense"]),
        "raw_generate_sparse": _rounded(times["generate_sparse"]),
    }


def shown(row: Row) -> str:
    """Say a row in one line, for the console."""
    name = f"{row['method']:<22} {row['target']:<5.4g}"
    if "reason" in row:
        return f"{name} {row['reason']}"
    times = f"{1e3 * row['sparse_p20']:6.1f} ms per token, dense {1e3 * row['dense_p20']:6.1f}"
    found = f"{name} {times}: {row['speedup']:.2f} times, of at most {row['limit']:.2f}"
    return found if "generate_speedup" not in row else f"{found}; generate {row['generate_speedup']:.2f} times"


def _rounded(seconds: list[float]) -> list[float]:
    return [round(s, 7) for s in seconds]
