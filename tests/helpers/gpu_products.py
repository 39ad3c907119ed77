"""What tests of GPU products share: draws, the masked form from the formula, and a watch on operators."""

from __future__ import annotations

import torch
from hypothesis import settings

from resting.sparsifier.decoding.cuda_masked import Masked
from resting.sparsifier.decoding.cuda_triton import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
LAUNCHES = [Launch(16, 16, 4, 1), Launch(16, 32, 4, 4), Launch(32, 16, 4, 2), Launch(64, 64, 8, 19)]
MASKED = [Masked(16, 16, 1, 1), Masked(16, 32, 1, 3), Masked(32, 16, 2, 1, 1), Masked(64, 64, 2, 2)]
FORMS = LAUNCHES + MASKED
FEW = settings(max_examples=16 if DEVICE == "cpu" else 6, deadline=None)  # a GPU compiles for every size


def draw(seed, dtype, *shapes):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(DEVICE, dtype) for shape in shapes]


def close(found, wanted, dtype, extra=1.0):
    """Equal up to the rounding of the stored result, and of a sum in fp32."""
    bound = torch.finfo(dtype).eps * extra
    return bool(((found.double() - wanted.double()).abs() <= bound * wanted.double().abs().clamp(min=1.0)).all())


def kept_of(x, rule):
    """The masked form of an input, in double precision, from the definition of a rule."""
    scale, threshold, shift = (torch.as_tensor(v).to(DEVICE) for v in (rule.scale, rule.threshold, rule.shift))
    moved = (x - shift.to(x.dtype)).double()
    return torch.where(scale.double() * moved.abs() > threshold.double(), moved, 0.0)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the calls of this project's operators, and has torch check what they are registered as."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "resting":
            self.seen.append((function, args))
        return function(*args, **(kwargs or {}))

    def check(self, count):
        assert len(self.seen) == count
        for function, args in self.seen:
            torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))
