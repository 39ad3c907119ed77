"""Lets launches begin while the one before them ends (programmatic dependent launch), where a GPU can.

A kernel that is launched so first waits for the one before it, then lets the next one begin. So what begins early may
count on all that was launched before the kernel that it waits for, and reads nothing younger until its wait is over.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton: launches wait for one another
    gdc_launch_dependents = gdc_wait = None

__all__ = ["chained", "gdc_launch_dependents", "gdc_wait", "on", "options"]


@cache
def chained(device: torch.device) -> bool:
    """Tells whether a launch may begin while the one before it ends: on NVIDIA's Hopper and later."""
    known = device.type == "cuda" and not torch.version.hip and gdc_wait is not None
    return known and torch.cuda.get_device_capability(device) >= (9, 0)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def options(device: torch.device) -> dict[str, Any]:
    """Gives what a launch is told besides its arguments."""
    return {"launch_pdl": True} if chained(device) else {}
