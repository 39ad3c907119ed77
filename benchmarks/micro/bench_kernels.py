"""Times the decode kernels against the dense product, on weights from memory and one thread.

One group per shape and dtype. `extra_info` of a case has the bytes of weights that it reads, and the share of the limit
that it reaches: where s of the inputs rest, a product can be 1 / (1 - s) times as fast as the best dense one. A dense
product's share is that of the best dense one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from resting.benchmarks.checks.guard import speed

SHAPES = [(576, 1536), (1536, 576), speed.SHAPE[:2], (2048, 8192)]
"""The embedded model's layers, what the guard looks at, and a layer of a model of 1B."""
DTYPES = [torch.float32, torch.bfloat16]
PRODUCTS = ["linear", "columns 0", "columns 0.5", "columns 0.9", "rows 0.5"]
DENSE = ("linear", "columns 0")
ROUNDS = 60


class Group:
    """The cases of one shape and dtype, and what is known once all of them ran."""

    def __init__(self, layer: speed.Layer) -> None:
        self.layer = layer
        self.done: dict[str, tuple[dict[str, Any], float]] = {}

    def compare(self) -> None:
        """Add to every case how near it comes to the limit."""
        dense = [seconds for name, (_, seconds) in self.done.items() if name in DENSE]
        for info, seconds in self.done.values():
            if dense:
                info["share_of_limit"] = round(min(dense) / seconds * info["bytes"] / self.layer.bytes, 3)
                info["over_dense"] = round(min(dense) / seconds, 3)


@pytest.fixture(
    scope="module", params=[(*shape, dtype) for shape in SHAPES for dtype in DTYPES], ids=lambda of: speed.label(*of)
)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    with speed.one_thread(), torch.inference_mode():
        group = Group(speed.Layer(*request.param))
        yield group
    group.compare()


@pytest.mark.parametrize("product", PRODUCTS)
def bench_product(benchmark: Any, group: Group, product: str) -> None:
    layer, number = group.layer, count()
    call = layer.product(product)
    benchmark.group = speed.label(layer.inputs, layer.outputs, layer.dtype)
    benchmark.extra_info |= {"product": product, "bytes": layer.bytes_read(product)}
    benchmark.pedantic(call, setup=lambda: ((next(number),), {}), rounds=ROUNDS, warmup_rounds=4)
    if benchmark.enabled:
        group.done[product] = benchmark.extra_info, benchmark.stats.stats.q1
