"""Knows experts that lie in one tensor, [experts, ...], as transformers holds them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from resting.sparsifier.activations import has_zeros
from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.projection import Projection
from resting.sparsifier.roles import EXPERTS_PER_TOKEN

PARAMETERS = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
"""Role of each tensor; biases have the same names with ``_bias`` behind them."""


@dataclass(frozen=True, eq=False)
class Experts:
    """Describes the experts of one block.

    Attributes
    ----------
    module : nn.Module
        Is called with hidden states [tokens, hidden], the experts of each token and their weights, both [tokens, k].
    count : int
        Of experts.
    per_token : int
        Experts that a token goes through.
    gated : bool
    transposed : bool
        Whether weights are [experts, in, out].
    has_act : bool
        Whether its gate is an activation times up and nothing else, or without a gate its activation has exact zeros.
    """

    module: nn.Module
    count: int
    per_token: int
    gated: bool
    transposed: bool
    has_act: bool

    @classmethod
    def of(cls, module: nn.Module, config: object) -> Experts | None:
        """Describes `module`, or gives None where it holds no experts.

        Raises
        ------
        UnsupportedModelError
            If they are of a form that is not known.
        """
        own = dict(module.named_parameters(recurse=False))
        wide = {name: p for name, p in own.items() if p.dim() == 3}
        if not wide or not set(wide) & set(PARAMETERS):
            return None
        kind, up = type(module).__name__, "gate_up_proj" if "gate_up_proj" in own else "up_proj"
        allowed = {up, "down_proj", f"{up}_bias", "down_proj_bias"}
        if unknown := sorted(set(own) - allowed):
            raise UnsupportedModelError(f"{kind} holds {unknown[0]} beside the weights of its experts")
        if not {up, "down_proj"} <= set(wide) or getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModelError(f"{kind} holds experts of a form that is not known")
        count, transposed, gated = len(wide[up]), bool(getattr(module, "is_transposed", False)), up != "up_proj"
        widths = [wide[name].shape[-1 if transposed else -2] for name in (up, "down_proj")]
        inputs = [wide[name].shape[-2 if transposed else -1] for name in (up, "down_proj")]
        if widths[0] != inputs[1] * (2 if gated else 1) or widths[1] != inputs[0]:
            raise UnsupportedModelError(f"{kind} holds experts whose shapes do not follow one another")
        default = getattr(getattr(module, "_apply_gate", None), "__name__", "") in ("", "_default_apply_gate")
        has_act = default if gated else has_zeros(module.act_fn)  # type: ignore[arg-type]
        return cls(module, count, experts_per_token(config, kind), gated, transposed, has_act)

    def projection(self, role: str, expert: int) -> Projection:
        """Shows the matrix of one expert."""
        name = next(name for name, of in PARAMETERS.items() if of == role)
        return Projection(self.module, name, expert, self.transposed)

    @property
    def roles(self) -> tuple[str, str]:
        """Gives the roles of an expert's matrices, in the order in which they are read."""
        return ("gate_up" if self.gated else "up", "down")

    @property
    def share(self) -> float:
        """Gives the share of the experts that a token reads."""
        return self.per_token / self.count


def experts_per_token(config: object, kind: str) -> int:
    """Reads from a config how many experts a token goes through.

    Raises
    ------
    UnsupportedModelError
        If it does not say.
    """
    for name in EXPERTS_PER_TOKEN:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise UnsupportedModelError(
        f"the config does not say how many experts of {kind} a token goes through; looked for "
        f"{', '.join(EXPERTS_PER_TOKEN)}"
    )
