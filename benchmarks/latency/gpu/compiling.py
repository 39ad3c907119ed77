"""What torch.compile is asked for on a GPU."""

from __future__ import annotations

import torch

from resting.sparsifier.decoding import cuda_overlap

TUNED = "coordinate_descent_tuning"
"""Option of torch.compile: it writes kernels of its own for products of one token, and tries out their layouts."""
OVERLAPPING = "triton.enable_pdl"
"""Option of torch.compile: its kernels begin while the ones before them end."""

DENSE_PATHS: dict[str, tuple[str, ...] | None] = {
    "graph": None,
    "compiled graph": (),
    "tuned graph": (TUNED,),
    "tuned overlapping graph": (TUNED, OVERLAPPING),
}
"""Of a dense model on a GPU, as they are tried: options of torch.compile; None where nothing is compiled."""


def overlaps(device: torch.device) -> bool:
    """Tell whether `OVERLAPPING` is there: a GPU that can, and a torch that knows it."""
    from torch._inductor import config

    return cuda_overlap.chained(device) and hasattr(config.triton, "enable_pdl")
