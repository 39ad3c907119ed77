"""Keeps the weights of a model in the order that a step reads them, in place, so that no second copy is held."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.contract import check, cutoff_of, input_major, keep_in_order, weight_of
from resting.sparsifier.decoding.stand_in import start_of
from resting.sparsifier.decoding.step.reading import roles_of
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.projection import Projection
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.roles import ACT
from resting.sparsifier.rule import Rule, Vector
from resting.sparsifier.sites import Site


@dataclass(frozen=True, eq=False)
class Matrix:
    """Holds a layer as a step reads it.

    Attributes
    ----------
    weight : Tensor [out, in]
    by_columns : bool
        Whether the weights of every input lie in one run, else those of every output.
    rule : Rule
    cutoff : float or Tensor [in]
    start : Tensor [out], optional
        The layer's own bias and the rule's.
    codes : QuantisedWeight, optional
        What is read in place of `weight`, which then lies in its usual order.
    """

    weight: Tensor
    by_columns: bool
    rule: Rule
    cutoff: Vector
    start: Tensor | None
    codes: QuantisedWeight | None = None


class CpuWeights:
    """Lays out the weights of a model for a step.

    A matrix whose input is masked is kept input-major. Of others, those with as many outputs as inputs or more are too:
    on one EPYC 9004 core, without a mask, the column kernel was faster than `torch.nn.functional.linear` for 8 of 10
    shapes in float32 (576 to 8,192 inputs, 192 to 128,256 outputs) and for all of them in bfloat16; where outputs are
    fewer than inputs, the row kernel was as fast or faster than both. So no layer is slower than its dense product.

    Parameters
    ----------
    model : nn.Module
    decoder : Decoder
        Of it.
    rules : dict of Site to Rule
        Of a plan; what has none is dense.
    by_rows : set of Site
        Matrices whose rows rest under neuron masks, so that columns of their MLPs' down do.
    codes : dict of Site to QuantisedWeight, optional
        Of formats with a kernel; the weights of such layers stay as they are, for prompts.
    head_codes : QuantisedWeight, optional
        The same of the output layer.

    Raises
    ------
    SparsifierError
        If there is no kernel for the dtype or a rule, or if layers have several dtypes.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        rules: Mapping[Site, Rule],
        by_rows: Set[Site] = frozenset(),
        codes: Mapping[Site, QuantisedWeight] | None = None,
        head_codes: QuantisedWeight | None = None,
    ) -> None:
        self._by_rows, self._after_zeros = by_rows, {site._replace(role="down") for site in by_rows}
        self._head_codes = head_codes
        self.codes: Mapping[Site, QuantisedWeight] = codes or {}
        self.head: nn.Linear = model.get_output_embeddings()
        self.dtype = self.head.weight.dtype
        self._decoder, self._rules = decoder, rules
        check(self.dtype, self.head.weight.device)
        for site in self._sites():
            if decoder.projection(site).weight.dtype != self.dtype:
                found = ", ".join(str(d) for d in (decoder.projection(site).weight.dtype, self.dtype))
                raise SparsifierError(f"a step takes layers of one dtype, found {found} at {site} and the output layer")
            cutoff_of(self._rule(site), self.dtype)
            if self._rule(site).weight is not None and site in self.codes:
                raise SparsifierError(
                    f"a rule with weights of its own at {site} has no product with those stored as "
                    f"{self.codes[site].format.name}"
                )
            if self.is_gated(site) and self._rule(site).low_rank is not None:
                raise SparsifierError(
                    f"a low-rank part at {site.role}, whose rows rest under an act mask, has no decode kernel"
                )
        for site, rule in rules.items():
            if site.role == ACT:
                cutoff_of(rule, self.dtype)

    @property
    def are_coded(self) -> bool:
        """Tells whether the step reads codes."""
        return bool(self.codes) or self._head_codes is not None

    def _sites(self) -> list[Site]:
        blocks = range(self._decoder.blocks)
        return [Site(i, role) for i in blocks for role in roles_of(self._decoder, i)]

    def _rule(self, site: Site) -> Rule:
        return self._rules.get(site, Rule())

    def act_of(self, block: int) -> Rule | None:
        """Gives the mask of a block's activated gate."""
        return self._rules.get(Site(block, ACT))

    def is_gated(self, site: Site) -> bool:
        """Tells whether rows of the matrix rest under a mask of the activated gate."""
        return site.role in ("up", "gate_up") and self.act_of(site.block) is not None

    def _by_columns(self, site: Site) -> bool:
        if self.is_gated(site) or site in self._by_rows:
            return False
        out, inputs = self._decoder.projection(site).weight.shape
        rests = not self._rule(site).masks_nothing or (site.role == "down" and self.act_of(site.block) is not None)
        return rests or site in self._after_zeros or self._rule(site).low_rank is not None or out >= inputs

    def lay_out(self) -> None:
        """Puts the weights into the order that the step reads."""
        for site in self._sites():
            if self._rule(site).weight is None and site not in self.codes:
                _keep(self._decoder.projection(site).module, self._by_columns(site))
        if self._head_codes is None:
            _keep(self.head, _is_wide(self.head))

    def restore(self) -> None:
        """Puts the weights back into their usual order."""
        for site in self._sites():
            _keep(self._decoder.projection(site).module, by_columns=False)
        _keep(self.head, by_columns=False)

    def matrix(self, site: Site) -> Matrix:
        """Shows the layer at `site`, laid out."""
        rule, matrix, by_columns = self._rule(site), self._decoder.projection(site), self._by_columns(site)
        cutoff, weight = cutoff_of(rule, self.dtype), weight_of(matrix, rule)
        if rule.weight is not None:
            weight = input_major(weight) if by_columns else weight.contiguous()
        start = start_of(matrix, rule)
        if site in self.codes:
            return Matrix(weight, not self.is_gated(site), rule, cutoff, start, self.codes[site])
        return _checked(Matrix(weight, by_columns, rule, cutoff, start))

    def output(self) -> Matrix:
        """Shows the output layer, laid out."""
        matrix = Projection.of(self.head)
        if self._head_codes is not None:
            return Matrix(matrix.weight, True, Rule(), -1.0, start_of(matrix, Rule()), self._head_codes)
        return _checked(Matrix(matrix.weight, _is_wide(self.head), Rule(), -1.0, start_of(matrix, Rule())))


def _is_wide(linear: nn.Linear) -> bool:
    return linear.out_features >= linear.in_features


def _keep(module: Any, by_columns: bool) -> None:
    weight = module.weight
    wanted = weight.t() if by_columns else weight
    if not wanted.is_contiguous():
        keep_in_order(weight, input_major if by_columns else Tensor.contiguous)


def _checked(matrix: Matrix) -> Matrix:
    wanted = matrix.weight.t() if matrix.by_columns else matrix.weight
    if not wanted.is_contiguous():  # two layers share it
        raise SparsifierError("two layers of this model share a weight that a step would have to keep in two orders")
    return matrix
