"""Looks up what one method lost, or won back, at one place, and whether it may be held against others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from resting.benchmarks.report.across.changes import Ends, change, direction
from resting.benchmarks.report.across.joined import Place
from resting.benchmarks.report.losses import Loss, Share
from resting.benchmarks.report.tables import mark

What = Literal["losses", "shares"]


@dataclass(frozen=True)
class Number:
    """Holds a loss in nats a token, or a share in percent.

    Attributes
    ----------
    what : {"losses", "shares"}
    ends : (value, low, high)
    shown : str
        As tables have it.
    why : str
        Why it is held against no other; empty where it is.
    """

    what: What
    ends: Ends
    shown: str
    why: str


def number(place: Place, what: What, method: str, target: float, reference: str | None) -> Number | None:
    """Look up the number of a method; None where it has none.

    A share is of two losses: it is no better than the worse of them.
    """
    loss = _cell(place.losses, method, target)
    if not isinstance(loss, Loss):
        return None
    if what == "losses":
        return Number(what, (loss.value, loss.low, loss.high), str(loss), loss.unranked)
    share, base = _cell(place.shares, method, target), _cell(place.losses, str(reference), target)
    if not isinstance(share, Share) or not isinstance(base, Loss):
        return None
    why = loss.unranked or (f"{reference}: {base.unranked}" if base.unranked else "")
    shown = f"{mark(share)} ({why})" if why else mark(share)
    ends = 100 * share.value, 100 * share.low, 100 * share.high
    return Number(what, ends, shown, "no loss beyond noise" if share.of_nothing else why)


def _cell(table: Any, method: str, target: float) -> Any:
    """A `Loss` or a `Share` that is finite, else None."""
    if method not in table.index or target not in table.columns:
        return None
    found = table.loc[method, target]
    return found if isinstance(found, Loss | Share) and math.isfinite(found.value) else None


def changed(found: Sequence[Number | None]) -> str:
    """Say how far the last of some numbers is from the first, and which way all of them go.

    Nothing is said where one is lacking or may not be held against the others.
    """
    known = [one for one in found if one is not None and not one.why]
    if len(known) < len(found):
        return ""
    ends = [one.ends for one in known]
    gap, form = change(ends[0], ends[-1]), "+.0f" if known[0].what == "shares" else "+.3f"
    between = "" if math.isnan(gap.low) else f" [{gap.low:{form}}, {gap.high:{form}}]"
    return f"{gap.value:{form}}{between}, {direction(ends)}"
