"""CUDA graphs: many launches that cost one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap

if TYPE_CHECKING:  # a step needs Triton, which is not there without a GPU
    from resting.benchmarks.latency.gpu.step import Step

TUNED = "coordinate_descent_tuning"
"""Option of torch.compile: it writes kernels of its own for products of one token, and tries out their layouts."""
OVERLAPPING = "triton.enable_pdl"
"""Option of torch.compile: its kernels begin while the ones before them end."""
WARM_UP = 3
"""Calls before a capture: they compile, and fill what is allocated once."""


def overlaps(device: torch.device) -> bool:
    """Tell whether `OVERLAPPING` is there: a GPU that can, and a torch that knows it."""
    from torch._inductor import config

    return cuda_overlap.chained(device) and hasattr(config.triton, "enable_pdl")


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Capture `call`, to be replayed; without a GPU it is called again."""
    if not torch.cuda.is_available():
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class GraphDecode:
    """Captures a step once and replays it for every token.

    Parameters
    ----------
    step : Step
    ids : Tensor [1, prompt + steps]
        Tokens are forced, so that every model decodes the same text.
    prompt : int
        Tokens that are fed one by one and not timed.
    compiled : bool
        What is between the products goes through torch.compile, once for all blocks; kernels hold it already.
    options : sequence of str, optional
        Of torch.compile, for the blocks: with `TUNED` the library's products are compiled too.
    """

    def __init__(self, step: Step, ids: Tensor, prompt: int, compiled: bool, options: Sequence[str] = ()) -> None:
        self.decoder, self.ids, self.prompt, self.position = step, ids, prompt, 0
        if compiled:
            around = {option: True for option in options if option == OVERLAPPING}  # the output layer stays the same
            step.entry.compile(dynamic=False, options=around or None)
            step.exit.compile(dynamic=False, options=around or None)
            for block in step.blocks if not step.by_kernels else ():
                block.compile(dynamic=False, options=dict.fromkeys(options, True) or None)
        self._replay = captured(self._forward)

    def _forward(self) -> None:
        self.logits = self.decoder()

    def begin(self) -> None:
        """Start again, after the prompt."""
        self.decoder.at.zero_()
        self.position = 0
        for _ in range(self.prompt):
            self.step()

    def step(self, _: int = 0) -> Tensor:
        """Compute the logits of the next token, in the same memory every time."""
        self.decoder.token.copy_(self.ids[:, self.position : self.position + 1])
        self.position += 1
        self._replay()
        return self.logits
