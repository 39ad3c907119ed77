"""Compares methods on a model and a text of yours: my model, my text, a table.

Run it as ``python examples/my_text_my_table.py``, or with a model and a UTF-8 file:
``python examples/my_text_my_table.py FOLDER FILE``. On the embedded model it takes a few minutes on two cores.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tabulate import tabulate

import resting
from resting import Plan, Site
from resting.benchmarks.assets import models

METHODS: dict[str, dict[str, Any]] = {"teal": {}, "wina": {}, "spon(teal)": {"steps": 8}}
"""Methods as suites name them, with what `resting.fit` is told about each; 8 training steps are few."""


def compare(model: Any, tokenizer: Any, text: Any, target: float = 0.5, **settings: Any) -> list[Plan]:
    """Fit every method for the same bytes; the end of the text is held out, and what a plan loses is measured there."""
    plans = []
    for method, own in METHODS.items():
        print(f"fitting {method} ...", file=sys.stderr)
        options = {"target": target, "tokenizer": tokenizer, "text": text, "progress": False} | settings | own
        plans.append(resting.fit(model, method, **options))
    return plans


def table(plans: list[Plan]) -> str:
    """Write one row per plan: measured bytes, and the loss above dense with its interval, in nats a token."""
    rows = []
    for plan in plans:
        found = plan.info["measured"]
        low, high = found["difference_low"], found["difference_high"]
        interval = "-" if low is None else f"[{low:.3f}, {high:.3f}]"
        rows.append([plan.method, f"{found['byte_sparsity']:.3f}", f"{found['difference']:.3f}", interval])
    headers = ["method", "bytes left unread", "loss above dense", "95 % interval"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def look(plan: Plan, block: int = 0) -> str:
    """Say what a plan decided in one block: the share of inputs that should rest, and the threshold."""
    shown = []
    for role in ("q", "o", "up", "down"):
        site = Site(block, role)
        ratio, threshold = plan.info["ratios"][str(site)], float(plan.rules[site].threshold)
        shown.append([role, f"{ratio:.2f}", f"{threshold:.4f}"])
    return tabulate(shown, ["input of", "ratio", "threshold"], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    source = models.resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    text = sys.argv[2] if len(sys.argv) > 2 else "wikipedia"
    model, tokenizer = source.load(torch.float32), source.tokenizer()
    fitted = compare(model, tokenizer, text, window=128, windows=16, matching_windows=4, held_out_windows=8)
    print(table(fitted), f"\nblock 0 of {fitted[0].method}:\n", look(fitted[0]), sep="\n")
