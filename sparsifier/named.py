"""Names a method: in suites, in results, and for what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, cast


class Named:
    """Gives a method, a dataclass, its name, its label in results and its spec: the base of `Sparsifier`."""

    name: ClassVar[str]
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Parameter settings that suites and results know as methods of their own, by name."""
    paper: ClassVar[str] = ""
    """Where the method is from: authors, year and arXiv number."""
    topk: bool
    protocol: str

    @property
    def label(self) -> str:
        """Names it in results: by its name or variant, and by what else was asked for."""
        protocol = "" if self.protocol == "common" else f", {self.protocol}"
        return f"{self._variant}{'-topk' if self.topk else ''}{protocol}"

    @property
    def _variant(self) -> str:
        names = [n for n, v in self.variants.items() if all(getattr(self, k) == value for k, value in v.items())]
        return names[-1] if names else self.name

    @property
    def has_seed(self) -> bool:
        """Tells whether it draws random numbers, by its parameter `seed`."""
        return hasattr(self, "seed")

    def spec(self) -> dict[str, Any]:
        """Collects all that determines the method's plan on a given model and text, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}
        return {"name": self.name} | {k: v.spec() if isinstance(v, Named) else v for k, v in values.items()}
