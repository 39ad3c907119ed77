"""Times on a GPU what quality costs: a cell's evaluation in dense forwards, and the fitting of methods in seconds.

    python benchmarks/micro/evaluation_on_gpu.py                 # ratios on the shapes of 135M and 8B
    python benchmarks/micro/evaluation_on_gpu.py --stages        # with the times of fitting and of a fingerprint

Weights are random, in bfloat16, and nothing is fetched. A dense forward is one of the whole model, logits of all tokens
in it. An evaluation adds up negative log-likelihood and KL to the dense model over the same windows, and a masked one
counts the bytes of its plan. The 8B shape has so few blocks as fit at once with room for all; two depths give the time
of a block, and with it that of 32. Host waits are counted by `torch.cuda.set_sync_debug_mode`. The parts of an
evaluation are timed one by one: where they are more than the whole, Python and the GPU work side by side in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from resting.baselines.cats import Cats
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.benchmarks.latency.random_models import random_model
from resting.benchmarks.quality import perplexity
from resting.benchmarks.quality.perplexity import DenseReference, Score, score
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    Calibration,
    Meter,
    Plan,
    final_hidden,
    fingerprint,
    fused_masking,
    logits,
)
from resting.sparsifier.batches import windows_per_forward

LENGTH, WINDOWS, ROUNDS = 512, 64, 5
POLICY = AllButFirst(1)
SMALL = LlamaConfig(
    vocab_size=49152, num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip


def once(run: Callable[[], Any]) -> float:
    """Return the time of `run`, with the device waited for before and after."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the median time of `run`, after a first one."""
    run()
    return statistics.median(once(run) for _ in range(rounds))


def waits(run: Callable[[], Any]) -> int:
    """Return how often the host waits for the device in `run`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def tokens(model: Any, windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random windows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (windows, length), generator=generator)


@torch.no_grad()
def forward(reference: DenseReference) -> None:
    """Run the dense model over all windows, logits of every token included."""
    model = reference.model
    rows = max(1, perplexity.LOGITS // 4 // model.config.vocab_size)
    for ids in reference.batches:
        for states in final_hidden(model, ids).flatten(0, 1).split(rows):
            logits(model, states)


def times(model: Any, at_least: int, length: int = LENGTH, windows: int = WINDOWS) -> dict[str, Any]:
    """Return seconds of a dense forward over all windows, and of evaluations in its place."""
    calibration = Calibration(tokens(model, 4, 128, 1), matching=tokens(model, 4, 128, 2))
    calibrated = CalibratedModel(model, calibration)
    dense = Plan({}, "dense", 0.0, 0.0, calibrated.model_fingerprint)
    teal, cats = Teal(0.5).plan_for(calibrated), Cats(0.3).plan_for(calibrated)
    ids = tokens(model, windows, length)
    size = windows_per_forward(at_least, length, model)
    reference = DenseReference(model, ids, size)
    score(reference, dense, POLICY)  # hidden states of the dense model, and kernels
    found: dict[str, Any] = {"batch": size, "forward": seconds(lambda: forward(reference))}
    for name, plan in {"dense": dense, "teal": teal, "cats": cats}.items():
        found[name] = seconds(partial(score, reference, plan, POLICY))
    found["waits"] = waits(lambda: score(reference, teal, POLICY))
    found["parts"] = parts(teal, reference)
    with mock.patch.object(perplexity, "has_room", return_value=False):
        fresh = DenseReference(model, ids, size)
        fresh._hidden = reference._hidden
        found["teal, logits not kept"] = seconds(lambda: score(fresh, teal, POLICY))
    reference.make_room()  # plain torch needs more of it
    try:
        expected, found["teal, plain torch"] = plain_torch(model, ids, size, teal)
    except torch.OutOfMemoryError:
        return found
    fused = score(reference, teal, POLICY)
    found["nll apart"] = float(abs(fused.nll / expected.nll - 1).max())
    found["kl apart"] = float(abs(fused.kl / expected.kl - 1).max())
    found["bytes apart"] = abs(fused.byte_sparsity - expected.byte_sparsity)
    return found


@torch.no_grad()
def parts(plan: Plan, reference: DenseReference) -> dict[str, float]:
    """Return seconds of what an evaluation of `plan` is made of."""
    model = reference.model

    def hidden() -> list[torch.Tensor]:
        return [final_hidden(model, batch) for batch in reference.batches]

    def applied() -> None:
        with plan.applied(model, POLICY, Meter()):
            pass

    def under(run: Plan, counted: bool) -> float:
        with run.applied(model, POLICY, Meter() if counted else None):  # a meter that knows nothing yet
            return once(hidden)

    found = {"plan on and off": seconds(applied), "dense, no logits": seconds(hidden)}
    nothing = Plan({}, "dense", 0.0, 0.0, plan.model)
    cases = {"dense and counted": (nothing, True), "masked": (plan, False), "masked and counted": (plan, True)}
    for name, case in cases.items():
        found[f"{name}, no logits"] = statistics.median(under(*case) for _ in range(ROUNDS))
    states = hidden()
    found["sums over the vocabulary"] = seconds(
        lambda: [perplexity._sums(reference, i, h, ids, 0) for i, (h, ids) in enumerate(zip(states, reference.batches))]
    )
    return found


def plain_torch(model: Any, ids: torch.Tensor, size: int, plan: Plan) -> tuple[Score, float]:
    """Return what an evaluation without kernels gives, and its seconds."""
    with (
        mock.patch.object(fused_masking, "is_for_kernels", return_value=False),
        mock.patch.object(perplexity, "_has_kernel", return_value=False),
        mock.patch.object(perplexity, "has_room", return_value=False),
    ):
        reference = DenseReference(model, ids, size)
        return score(reference, plan, POLICY), seconds(lambda: score(reference, plan, POLICY), 2)


def shown(title: str, found: dict[str, Any]) -> None:
    """Print evaluations in dense forwards."""
    one = found["forward"]
    names = [n for n in found if n in ("dense", "cats") or n.startswith("teal")]
    print(f"{title}: batch {found['batch']:.0f}, forward {one * 1e3:.1f} ms")
    print("   " + ", ".join(f"{name} {found[name] / one:.3f}" for name in names) + " dense forwards")
    print(
        "   "
        + ", ".join(f"{n} {found[n]:.2g}" for n in ("waits", "nll apart", "kl apart", "bytes apart") if n in found)
    )
    print("   ms: " + ", ".join(f"{name} {value * 1e3:.1f}" for name, value in found["parts"].items()), flush=True)


def of_depth(few: dict[str, Any], many: dict[str, Any], layers: tuple[int, int], depth: int) -> dict[str, Any]:
    """Return the times of `depth` blocks, from those of fewer."""
    low, high = layers
    timed = [n for n in few.keys() & many if n in ("forward", "dense", "cats") or n.startswith("teal")]
    rest = {n: many[n] for n in many if n not in timed}
    return rest | {n: few[n] + (many[n] - few[n]) / (high - low) * (depth - low) for n in timed}


def stages() -> None:
    """Print how long methods take to fit on the 135M shape, as `baselines-wide` does."""
    model = small()
    calibration = Calibration(tokens(model, 64, 512, 1), statistics_windows=64, matching=tokens(model, 144, 512, 2))
    calibrated = CalibratedModel(model, calibration, needs=Teal(0.5).needs | RSparse(0.5).needs)
    begin = time.perf_counter()
    calibrated.statistics(Teal(0.5).needs)
    torch.cuda.synchronize()
    print(f"statistics {time.perf_counter() - begin:.1f} s")
    greedy = Teal(0.5, allocation="greedy", step=0.05, windows=4, window=512)
    for name, make in {
        "teal": lambda: Teal(0.5),
        "teal-greedy, steps of 0.05": lambda: greedy,
        "spon(teal), 40 steps": lambda: Spontaneous(Teal(0.5), steps=40, batch=16, match_every=40),
        "rsparse": lambda: RSparse(0.5),
    }.items():
        begin = time.perf_counter()
        try:
            make().plan_for(calibrated)
        except Exception as error:  # a method's parameters may have changed: the others are timed all the same
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        torch.cuda.synchronize()
        print(f"{name} {time.perf_counter() - begin:.1f} s", flush=True)


def hashing() -> None:
    """Print how long the fingerprint of a model of 8B takes."""
    model = random_model("llama-3-8b", torch.bfloat16, "cuda")
    taken = seconds(lambda: fingerprint._of_pieces(model), 3)
    print(f"fingerprint of the 8B shape, {sum(p.nbytes for p in model.parameters()) / 1e9:.1f} GB: {taken:.2f} s")


def small() -> Any:
    """Build the shape of the default model."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(SMALL, dtype=torch.bfloat16).eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--only", choices=("135m", "8b"))
    chosen = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    if chosen.only != "8b":
        model = small()
        shown("135M shape, 64 x 512", times(model, 16))
        shown("135M shape, 16 x 2048", times(model, 1, 2048, 16))
        del model
    if chosen.only != "135m":
        depths = (2, 6)
        found = []
        for layers in depths:
            model = random_model("llama-3-8b", torch.bfloat16, "cuda", num_hidden_layers=layers)
            found.append(times(model, 16))
            del model
            torch.cuda.empty_cache()
        shown("8B shape, 6 blocks", found[1])
        shown("8B shape, 32 blocks", of_depth(found[0], found[1], depths, 32))
    if chosen.stages:
        stages()
        hashing()


if __name__ == "__main__":
    main()
