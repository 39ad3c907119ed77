"""Writes text under a plan, and measures how fast: dense and sparse tokens in turn, in one process.

Run it as ``python examples/generate_and_time.py``, or with a plan that `resting fit` wrote for the embedded model:
``python examples/generate_and_time.py PLAN``. Without one it fits TEAL first, which takes a minute or two.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

import resting
from resting import Plan
from resting.benchmarks.assets import models

WARM_UP = 4
"""Tokens whose time is not taken: code is compiled, and caches grow."""


@torch.inference_mode()
def seconds(model: Any, ids: Tensor, new: int) -> tuple[Tensor, float]:
    """Write `new` tokens greedily; return the ids and the seconds of each, without the prompt and the warm-up."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, max_new_tokens=WARM_UP, **options)
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    prompt = time.perf_counter() - began
    began = time.perf_counter()
    written = model.generate(ids, max_new_tokens=new, **options)
    return written, (time.perf_counter() - began - prompt) / (new - 1)


def in_turn(model: Any, plan: Plan, ids: Tensor, new: int = 32, rounds: int = 3) -> tuple[Tensor, float, float]:
    """Time both models in turn, so that other work on the machine hits both; return the sparse text, and medians."""
    dense, sparse = [], []
    for _ in range(rounds):
        dense.append(seconds(model, ids, new)[1])
        with resting.decoding(plan, model):  # single tokens go through kernels that do not read what rests
            written, took = seconds(model, ids, new)
        sparse.append(took)
    return written, statistics.median(dense), statistics.median(sparse)


if __name__ == "__main__":
    source = models.resolve("smollm2-135m")
    model, tokenizer = source.load(torch.float32), source.tokenizer()
    few = {"window": 128, "windows": 16, "matching_windows": 4, "held_out_windows": 4}
    plan = Plan.load(sys.argv[1]) if len(sys.argv) > 1 else resting.fit(model, "teal", tokenizer=tokenizer, **few)
    ids = tokenizer("The history of the city began", return_tensors="pt").input_ids
    written, dense, sparse = in_turn(model, plan, ids)
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    print(f"\ndense  {1e3 * dense:6.1f} ms a token\nsparse {1e3 * sparse:6.1f} ms a token")
    print(f"The sparse model is {dense / sparse:.2f} times as fast.")
    print("dense is plain transformers here; `resting run latency` compares with the fastest dense path")
