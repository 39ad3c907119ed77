"""Names the formats that weights may be stored in: bits of a code, and how many outputs share a scale."""

from __future__ import annotations

import re
from typing import NamedTuple

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.meter import PLAIN_BITS

AS_IS = "as-is"
"""Weights as the model's files hold them."""
SCALE_BITS = 16
INT8_GROUP = 128
NAMES = (AS_IS, "int8", "int4-g128", "int4-g32", "int3-g128")
"""The formats that suites usually ask for. Any other group, and a zero point, are named in the same way."""
_NAME = re.compile(
    r"int(?P<bits>3|4|8)(?:-g(?P<group>[1-9][0-9]{0,4}))?(?P<zero>-zero)?(?P<head>-head)?(?P<gptq>-gptq)?"
)


class Format(NamedTuple):
    """Describes how a matrix is stored: groups run along the *outputs* of one input.

    So an input's row is one run of codes with its own scales, and a resting input leaves both unread. Groups along the
    inputs, as files for dense kernels have them, would be read whole at any sparsity.

    Attributes
    ----------
    bits : int
        Of a code: 3, 4 or 8.
    group : int
        Outputs that share a scale.
    zero : bool
        Whether a group has a zero point beside its scale; else codes are symmetric around 0.
    compensated : bool
        Whether codes make up for one another's errors on calibration text, and are not the nearest: how they were
        found, and nothing of how they are stored.
    head : bool
        Whether the output layer is stored in it as well, and not the block linears alone. Its codes are the nearest.
    """

    bits: int
    group: int
    zero: bool = False
    compensated: bool = False
    head: bool = False

    @property
    def name(self) -> str:
        """Names it as suites do, such as ``int4-g128``."""
        group = "" if self.bits == 8 and self.group == INT8_GROUP else f"-g{self.group}"
        return f"int{self.bits}{group}{'-zero' * self.zero}{'-head' * self.head}{'-gptq' * self.compensated}"

    @property
    def stored(self) -> Format:
        """Gives the format that kernels read: how codes were found is none of their business."""
        return self._replace(compensated=False)

    @property
    def lowest(self) -> int:
        """Gives the lowest code: -8 of 4 bits, -4 of 3 bits; -127 of 8 bits, so that a sign can always change."""
        return -127 if self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Gives the highest code: 127, 7 or 3."""
        return (1 << (self.bits - 1)) - 1

    @property
    def bits_beside(self) -> float:
        """Gives a weight's share of its scale and zero point, in bits."""
        return (SCALE_BITS + (self.bits if self.zero else 0)) / self.group

    @property
    def bits_a_weight(self) -> float:
        """Gives what a weight takes with its share of the scale and of the zero point, in bits."""
        return self.bits + self.bits_beside

    @classmethod
    def parse(cls, name: str) -> Format | None:
        """Reads a name; None is ``as-is``.

        Raises
        ------
        SparsifierError
            If there is no such format.
        """
        if name == AS_IS:
            return None
        found = _NAME.fullmatch(name)
        if found is None or (found["bits"] != "8" and found["group"] is None):
            raise SparsifierError(
                f"there is no weight format {name!r}; allowed: {', '.join(NAMES)}, or another group, as int4-g64, and "
                "a zero point, as int4-g128-zero, the output layer too, as int4-g128-head, or codes that make up for "
                "errors, as int4-g128-gptq"
            )
        group, marks = int(found["group"] or INT8_GROUP), [bool(found[mark]) for mark in ("zero", "gptq", "head")]
        format = cls(int(found["bits"]), group, *marks)
        if format.name != name:
            raise SparsifierError(f"weight format {name!r} is called {format.name!r}")
        return format


def bits_a_weight(name: str) -> float:
    """Gives what a weight of a block linear takes in the format called `name`; 16 bits as it is (bfloat16)."""
    format = Format.parse(name)
    return PLAIN_BITS if format is None else format.bits_a_weight
