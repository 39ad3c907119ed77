"""Gives every method one look, the same in every plot and on the page, and told by marker and dash alone.

The shape says which sparsifier it is, also below a wrapper; its fill and the dash say what is wrapped around it.
Colours are those of Okabe and Ito and of Tol, which most people tell apart whatever they see of red and green.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from resting.benchmarks import labels

Dash = tuple[float, ...]


@dataclass(frozen=True)
class Style:
    """Holds what one method looks like.

    Attributes
    ----------
    colour : str
    marker : str
        A name of matplotlib's.
    fill : {"none", "full", "left", "right", "top", "bottom"}
        Which part of the marker is filled.
    dash : tuple of float
        Lengths of lines and gaps in widths of the line; empty for a whole line.
    width : float
        Of the line, in points.
    """

    colour: str
    marker: str
    fill: str
    dash: Dash = ()
    width: float = 1.4

    @property
    def line(self) -> dict[str, Any]:
        """Return what matplotlib's ``plot`` takes."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "fillstyle": self.fill,
            "markerfacecolor": "white" if self.fill == "none" else self.colour,
            "markerfacecoloralt": "white",
            "linestyle": (0, self.dash) if self.dash else "-",
            "linewidth": self.width,
        }

    @property
    def key(self) -> tuple[str, str, Dash]:
        """Return what tells it from others without colour."""
        return self.marker, self.fill, self.dash


DENSE = Style("#222222", "8", "full")
BARE = {
    "teal": ("#0072B2", "o", (5.0, 2.0)),
    "teal-greedy": ("#009E73", "s", (8.0, 2.0)),
    "cats": ("#E69F00", "v", (3.0, 2.0)),
    "chess": ("#CC79A7", "^", (2.0, 2.0)),
    "chess-attention": ("#8C564B", "P", (6.0, 2.0, 1.0, 2.0)),
    "rsparse": ("#56B4E9", "D", (1.0, 1.0)),
    "rsparse-search": ("#3A8DBB", "d", (4.0, 1.0)),
    "wina": ("#999933", "X", (3.0, 1.0, 1.0, 1.0)),
    "wina-greedy": ("#6F7021", "*", (9.0, 2.0, 2.0, 2.0)),
    "wina-released": ("#B8A200", "h", (2.0, 1.0)),
    "wina-released-greedy": ("#5C5A12", "p", (7.0, 1.0, 1.0, 1.0)),
}
"""Colour, shape and dash of known sparsifiers; their markers are open. A wrapped one keeps its shape."""
WRAPPED = {
    "spon": ("#D55E00", "left", (9.0, 1.5), 1.6),
    "spon-refined": ("#882255", "full", (), 2.2),
    "mean-error": ("#7F7F7F", "right", (1.0, 1.5), 1.3),
    "fisher-error": ("#44AA99", "top", (4.0, 1.5, 1.0, 1.5), 1.3),
    "random-direction": ("#B0A0A0", "bottom", (1.0, 3.0), 1.3),
}
"""Colour, fill, dash and width of known wrappers."""
COLOURS = ("#332288", "#117733", "#CC6677", "#AA4499", "#661100", "#6699CC", "#88AA00", "#DD7788", "#005F73", "#A6761D")
MARKERS = ("<", ">", "H", "p", "d", "s", "^", "v", "D", "P", "X", "*", "h")
DASHES: tuple[Dash, ...] = tuple(
    (a, b, c, b) if c else (a, b)
    for b in (1.2, 2.4, 3.6)
    for a in (1.5, 2.5, 3.5, 4.5, 6.5, 8.5, 10.5)
    for c in (0, 1.5)
)
"""Of methods and variants that are not known here; none is one of those above."""
FILLS = ("none", "full", "left", "right", "top", "bottom")
BROKEN = 3.0
"""Nats a token above dense: what is above is twenty times as perplexed, and is named beside a picture, not drawn."""


def of(method: str) -> Style:
    """Return the look of `method`, which depends on nothing but its label."""
    if method == "dense":
        return DENSE
    wrapper, base, variant = labels.split(method)
    colour, marker, dash = BARE.get(base) or (_pick(COLOURS, base), _pick(MARKERS, base), _pick(DASHES, base))
    style = Style(colour, marker, "none", dash)
    if wrapper:
        deep = re.sub(r"\([^()]*\)*$", "", labels.cut(method)[0])  # all that is wrapped, outermost first
        known = WRAPPED.get(deep)
        if known:
            colour, fill, dash, width = known
            # Shapes of unknown sparsifiers are drawn by lot, and so the dash has to tell them apart.
            dash = dash if base in BARE else _pick(DASHES, f"{wrapper} {base}")
        else:
            colour, fill, width = _pick(COLOURS, deep), _pick(FILLS[1:], deep), 1.4
            dash = _pick(DASHES, f"{deep} {base}")
        style = Style(colour, marker, fill, dash, width)
    return replace(style, dash=_pick(DASHES, method), width=1.2) if variant else style


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Return the looks of `methods`; one that another one has already takes the next free dash.

    What has a fixed look keeps it, whatever it stands beside.
    """
    out = {method: of(method) for method in dict.fromkeys(methods)}
    taken: set[tuple[str, str, Dash]] = set()
    for method in sorted(out, key=lambda m: not _is_fixed(m)):
        style, place = out[method], 0
        while style.key in taken and place < len(DASHES):
            style = replace(style, dash=DASHES[(DASHES.index(_pick(DASHES, method)) + place) % len(DASHES)])
            place += 1
        out[method] = style
        taken.add(style.key)
    return out


def rank(method: str) -> tuple[int, ...]:
    """Return where `method` stands in a list: dense, the sparsifiers as they are known, others, what is wrapped."""
    wrapper, base, variant = labels.split(method)
    wrappers, bases = list(WRAPPED), list(BARE)
    return (
        int(method != "dense"),
        int(bool(variant)),
        0 if not wrapper else 1 + (wrappers.index(wrapper) if wrapper in WRAPPED else len(wrappers)),
        bases.index(base) if base in BARE else len(bases),
    )


def in_order(methods: Iterable[str]) -> list[str]:
    """Sort `methods` as every legend does; by name where nothing else tells."""
    return sorted(dict.fromkeys(methods), key=lambda m: (rank(m), m))


def _is_fixed(method: str) -> bool:
    wrapper, base, variant = labels.split(method)
    return method == "dense" or (base in BARE and not variant and (not wrapper or wrapper in WRAPPED))


def _pick(among: tuple[Any, ...], name: str) -> Any:
    """One of `among` by the hash of `name`, and so the same on every machine."""
    return among[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % len(among)]
