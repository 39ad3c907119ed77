"""Decoding on a GPU: the dense and the sparse step in turn, each one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo

from resting.benchmarks.latency import timing
from resting.benchmarks.latency.decode import DENSE_TRIAL, Decode, measured_sparsity, neutral
from resting.benchmarks.latency.gpu.graphs import OVERLAPPING, TUNED, GraphDecode, overlaps
from resting.benchmarks.latency.gpu.step import Step
from resting.benchmarks.latency.gpu.weights import Weights, fuse
from resting.benchmarks.latency.timed_model import Subject
from resting.sparsifier import Plan, Rule
from resting.sparsifier.decoding.break_even import break_even
from resting.sparsifier.decoding.contract import Product, input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns

VARIANTS = 64
"""Kinds of modules (blocks of several models, what is around them) that torch.compile may keep code for."""


class GpuModel:
    """A model whose steps share two copies of its weights, one of each order.

    Parameters
    ----------
    subject : Subject
    prompt : int
    """

    def __init__(self, subject: Subject, prompt: int) -> None:
        self.model, self.ids, self.prompt = subject.dense, subject.ids, prompt
        self.weights: list[dict[str, Weights]] = fuse(self.model)
        subject.declare()
        self.length = -(-self.ids.shape[1] // 16) * 16
        output = self.model.get_output_embeddings()
        self.head: Product = output
        if break_even(output.weight) == 0.0:
            layer = [(output.out_features, Rule())]
            self.head = CudaColumns(input_major(output.weight.detach()), layer, output.bias, reads_all=True)
        self.compiled = True

    @torch.inference_mode()
    def decode(self, plan: Plan | None, compiled: bool, *options: str) -> GraphDecode:
        """A captured step under a plan, or by the library's products; the output layer is the same, and dense."""
        step = Step(self.model, self.weights, self.length, None if plan is None else plan.rules, self.head)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return GraphDecode(step, self.ids, self.prompt, compiled, options)

    @torch.inference_mode()
    def fastest_dense(self) -> tuple[str, GraphDecode, dict[str, float | str]]:
        """The fastest dense way, ready to decode, and seconds a token of every way, or why it did not run."""
        found: dict[str, float | str] = {}
        ways: dict[str, GraphDecode] = {}
        steps = min(DENSE_TRIAL, self.ids.shape[1] - self.prompt - 1)
        tried: list[tuple[str, Plan | None, bool, tuple[str, ...]]] = [
            ("graph", None, False, ()),
            ("compiled graph", None, True, ()),
            ("tuned graph", None, True, (TUNED,)),
            ("kernels", neutral(self.model), True, ()),
        ]
        if overlaps(self.ids.device):
            tried.append(("tuned overlapping graph", None, True, (TUNED, OVERLAPPING)))
        for name, plan, compiled, options in tried:
            try:
                way = self.decode(plan, compiled, *options)
                way.begin()
                found[name] = timing.fast(timing.interleaved({name: way.step}, steps - 1, timing.device_clock())[name])
                ways[name] = way
            except Exception as error:  # a compiler that is missing
                found[name] = " ".join(str(error).split())[:300]
        self.compiled = "kernels" in ways
        eager = Decode(self.model, self.ids, self.prompt, static=True)
        times = timing.interleaved({"eager": eager.step}, steps - 1, timing.device_clock())
        found["transformers"] = timing.fast(times["eager"])
        seconds = {name: found[name] for name in ways}
        best = min(ways, key=lambda name: float(seconds[name]))
        return best, ways[best], found

    @torch.inference_mode()
    def compare(self, dense: GraphDecode, plan: Plan, base: Plan | None = None) -> dict[str, Any]:
        """Raw seconds of every step of both, and under `base`, in turn, and the sparsity of what is decoded."""
        sparsity = measured_sparsity(self.model, plan, self.ids, self.prompt)
        ways = {"dense": dense, "sparse": self.decode(plan, self.compiled)}
        if base is not None:
            ways["base"] = self.decode(base, self.compiled)
        for way in ways.values():
            way.begin()
        steps = self.ids.shape[1] - self.prompt - 1
        times = timing.interleaved({name: way.step for name, way in ways.items()}, steps, timing.device_clock())
        return {**times, "sparsity": sparsity, "prefill_dense": [float("nan")], "prefill_sparse": [float("nan")]}


def copy_bandwidth(device: str, size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy on the device: what a kernel can reach."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    source.random_()
    times = timing.interleaved({"copy": lambda _: target.copy_(source)}, 20, timing.device_clock())
    return 2 * size / timing.fast(times["copy"])
