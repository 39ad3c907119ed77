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
from resting.benchmarks.latency.timed_model import TimedModel
from resting.sparsifier import Plan, Rule
from resting.sparsifier.decoding.break_even import break_even
from resting.sparsifier.decoding.contract import Product, input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns

VARIANTS = 64
"""Kinds of modules (blocks of several models, what is around them) that torch.compile may keep code for."""


class GpuModel:
    """Makes the steps of a model, which share two copies of its weights, one of each order.

    Parameters
    ----------
    model : TimedModel
    prompt : int
    """

    def __init__(self, model: TimedModel, prompt: int) -> None:
        self.model, self.ids, self.prompt = model.dense, model.ids, prompt
        self.weights: list[dict[str, Weights]] = fuse(self.model)
        model.declare()
        self.length = -(-self.ids.shape[1] // 16) * 16
        output = self.model.get_output_embeddings()
        self.head: Product = output
        if break_even(output.weight) == 0.0:
            layer = [(output.out_features, Rule())]
            self.head = CudaColumns(input_major(output.weight.detach()), layer, output.bias, reads_all=True)
        self.compiled = True

    @torch.inference_mode()
    def decode(self, plan: Plan | None, compiled: bool, *options: str) -> GraphDecode:
        """Capture a step under a plan, or by the library's products; the output layer is the same, and dense."""
        if plan is not None:
            plan.check_plain("decoded")
        step = Step(self.model, self.weights, self.length, None if plan is None else plan.rules, self.head)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return GraphDecode(step, self.ids, self.prompt, compiled, options)

    @torch.inference_mode()
    def fastest_dense(self) -> tuple[str, GraphDecode, dict[str, float | str]]:
        """Find the fastest dense path.

        Returns
        -------
        str
            Its name.
        GraphDecode
            The step, ready to decode.
        dict of str to float or str
            Seconds per token of every path, or why it did not run.
        """
        found: dict[str, float | str] = {}
        decodes: dict[str, GraphDecode] = {}
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
                decode = self.decode(plan, compiled, *options)
                decode.begin()
                times = timing.interleaved({name: decode.step}, steps - 1, timing.device_clock())
                found[name] = timing.p20(times[name])
                decodes[name] = decode
            except Exception as error:  # a compiler that is missing
                found[name] = " ".join(str(error).split())[:300]
        self.compiled = "kernels" in decodes
        eager = Decode(self.model, self.ids, self.prompt, static=True)
        times = timing.interleaved({"eager": eager.step}, steps - 1, timing.device_clock())
        found["transformers"] = timing.p20(times["eager"])
        best = min(decodes, key=lambda name: float(found[name]))
        return best, decodes[best], found

    @torch.inference_mode()
    def compare(self, dense: GraphDecode, plan: Plan, base: Plan | None = None) -> dict[str, Any]:
        """Decode with both, and under `base`, in turn: raw seconds of every step, and the sparsity of the tokens."""
        sparsity = measured_sparsity(self.model, plan, self.ids, self.prompt)
        decodes = {"dense": dense, "sparse": self.decode(plan, self.compiled)}
        if base is not None:
            decodes["base"] = self.decode(base, self.compiled)
        for decode in decodes.values():
            decode.begin()
        steps = self.ids.shape[1] - self.prompt - 1
        calls = {name: decode.step for name, decode in decodes.items()}
        times = timing.interleaved(calls, steps, timing.device_clock())
        return {**times, "sparsity": sparsity, "prefill_dense": [float("nan")], "prefill_sparse": [float("nan")]}
