"""Decodes under a plan: one token at a time goes through the kernels, so that what rests is not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from resting.sparsifier.decoding.break_even import break_even, threads_for
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.products import columns, rows
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.layers import SparseActivation, SparseLinear, StandIn, installed
from resting.sparsifier.masking import Masking
from resting.sparsifier.plan import Plan
from resting.sparsifier.policy import AllButFirst, TokenPolicy
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import ACT, Decoder, Site, Slot
from resting.sparsifier.token_tracker import TokenTracker


class DecodeStandIn(StandIn):
    """Stands for a module whose weights a kernel holds."""

    def _load_from_state_dict(self, *args: object) -> NoReturn:
        raise SparsifierError("weights cannot be loaded while decode kernels hold them: leave the `with` block first")


class DecodeLinear(DecodeStandIn):
    """Runs a linear layer at decode: the kernel for one sparse token, the masked definition for anything else.

    A prompt also tells how much rests. Where that is below the measured break-even of this shape, the layer computes
    what it masks densely, so that no plan is slower than the dense model.

    Parameters
    ----------
    masked : SparseLinear
        The definition; the layer that it stands for keeps its weights input-major from now on.
    threads : int
    """

    stands_for = "linear"

    def __init__(self, masked: SparseLinear, threads: int) -> None:
        super().__init__()
        self.masked = masked
        self._tokens = masked.tokens
        self.linear = masked.linear
        self.rule = masked.rule
        weight = self.linear.weight
        self.threads = threads_for(weight, threads)
        self.pays = not self.rule.masks_nothing or break_even(weight, threads) == 0.0
        self._features = self.linear.in_features
        if not self.pays:
            return
        weight.data = input_major(weight.data)
        self._masking = Masking(self.rule)
        self._bias = _start(self.linear, self.rule)
        self._product = columns(weight, self.rule, self._bias, self.threads)

    def forward(self, x: Tensor) -> Tensor:
        if self._tokens.is_decoding and self.pays:
            return self._product(x)
        if not self._tokens.is_decoding:
            self._decide(x)
        return self.masked(x)

    def _decide(self, x: Tensor) -> None:
        """Chooses the kernel or the dense product by the share of the weights that a prompt's inputs let rest."""
        if x.shape[-2] == 1 or self.rule.masks_nothing:
            return
        rests = 1.0 - float((self._masking(x) != 0).float().mean())
        pays = saved(self.rule, self.linear.weight, rests) >= break_even(self.linear.weight, self.threads)
        if pays != self.pays:
            self.pays = pays
            weight = self.linear.weight
            weight.data = input_major(weight.data) if pays else weight.data.contiguous()
            self._product = columns(weight, self.rule, self._bias, self.threads) if pays else self._product


def saved(rule: Rule, weight: Tensor, rests: float) -> float:
    """Computes the share of bytes of `weight` [out, in] left unread when a share `rests`, less what U and V read."""
    if rule.low_rank is None:
        return rests
    out, inputs = weight.shape
    rank = rule.low_rank[1].shape[0]
    return rests - rank * (rests * inputs + out) / (inputs * out)


class DecodeHead(DecodeStandIn):
    """Runs the dense output layer at decode through the kernel, where that reads all of it faster."""

    stands_for = "linear"

    def __init__(self, linear: nn.Linear, threads: int) -> None:
        super().__init__()
        self.linear = linear
        linear.weight.data = input_major(linear.weight.data)
        self._features = linear.in_features
        self._product = columns(linear.weight, Rule(), linear.bias, threads_for(linear.weight, threads))

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x) if x.numel() == self._features else self.linear(x)


class DecodeMLP(DecodeStandIn):
    r"""Runs an MLP whose activated gate is masked: resting rows of ``up`` and columns of ``down`` are not read.

    .. math:: y = W_{down} (a \odot W_{up} x), \qquad a = \sigma(W_{gate} x) \odot [|\sigma(W_{gate} x)| > t]

    Parameters
    ----------
    mlp : nn.Module
        The module it stands for, called as it is for anything but one sparse token.
    tokens : TokenTracker
    threads : int
    gate, up, down, activation : nn.Module
        Those of the plan.
    """

    stands_for = "mlp"

    def __init__(
        self,
        mlp: nn.Module,
        tokens: TokenTracker,
        threads: int,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.mlp, self.gate, self.down = mlp, gate, down
        self._tokens = tokens
        self.activation = activation.activation if isinstance(activation, SparseActivation) else activation
        linear = up.linear if isinstance(up, SparseLinear) else up
        assert isinstance(linear, nn.Linear)
        rule = up.rule if isinstance(up, SparseLinear) else Rule()
        if rule.low_rank is not None:
            raise SparsifierError("a low-rank part at up, whose rows rest under an act mask, has no decode kernel")
        self._masking = None if rule.masks_nothing else Masking(rule)
        assert isinstance(activation, SparseActivation)
        threads = threads_for(linear.weight, threads)
        self._rows = rows(linear.weight, activation.shared.rule, _start(linear, rule), threads)

    def forward(self, x: Tensor) -> Tensor:
        if not self._tokens.is_decoding:
            return self.mlp(x)
        gate = self.activation(self.gate(x))
        return self.down(self._rows(x if self._masking is None else self._masking(x), gate))


@contextmanager
def decoding(
    plan: Plan, model: nn.Module, tokens: TokenPolicy = AllButFirst(1), threads: int | None = None
) -> Iterator[nn.Module]:
    """Makes `model` decode under `plan` with kernels that do not read what rests, inside the ``with`` block.

    Prompts, batches and tokens that the policy keeps dense go through the masked definition, as under `Plan.applied`;
    one sparse token at a time through the kernels. Weights under a column mask are kept input-major inside the block,
    in place of their usual order and not beside it, so that no second copy is held.

    Parameters
    ----------
    plan : Plan
    model : nn.Module
        In float32 or bfloat16 on a CPU, in bfloat16 or float16 on a GPU.
    tokens : TokenPolicy
        Which tokens are sparse.
    threads : int, optional
        Of every product; torch's number where None.

    Raises
    ------
    SparsifierError
        If there is no kernel for the device, the dtype or a rule of the plan.
    PlanError
        As `Plan.applied` and `Plan.check_plain`.
    """
    threads = torch.get_num_threads() if threads is None else threads
    decoder = Decoder.of(model)
    tracker = TokenTracker(tokens)
    with ExitStack() as stack:
        plan.check_plain("decoded")
        plan.check(model)
        stack.callback(tracker.watch(decoder.trunk).remove)
        # A site without a rule may still be faster through the kernel; and zeros of a masked gate rest at down.
        rules = {site: Rule() for site in decoder.sites()} | plan.rules
        gated = {site.block for site in rules if site.role == ACT}
        for site, layer in stack.enter_context(installed(decoder, rules, tracker)).items():
            if isinstance(layer, SparseLinear) and not (site.role == "up" and site.block in gated):
                _swap(stack, decoder, site, DecodeLinear(layer, threads))
        for block in gated:
            _swap_mlp(stack, decoder, block, tracker, threads)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Linear) and break_even(head.weight, threads) == 0.0:
            slot = _slot_of(model, head)
            stack.callback(setattr, *slot, head)
            stack.callback(_restore_order, head.weight)
            setattr(*slot, DecodeHead(head, threads))
        yield model


def _swap(stack: ExitStack, decoder: Decoder, site: Site, layer: DecodeLinear) -> None:
    slot, weight = decoder.slots[site], layer.linear.weight
    stack.callback(_restore_order, weight)
    stack.callback(setattr, slot.parent, slot.attribute, slot.module)
    setattr(slot.parent, slot.attribute, layer)


def _restore_order(weight: Tensor) -> None:
    weight.data = weight.data.contiguous()


def _swap_mlp(stack: ExitStack, decoder: Decoder, block: int, tokens: TokenTracker, threads: int) -> None:
    slots = {role: decoder.slots[Site(block, role)] for role in ("gate", "up", "down", ACT)}
    mlp = slots["gate"].parent
    slot = _slot_of(decoder.layers[block], mlp)
    modules = [slots[role].module for role in ("gate", "up", "down", ACT)]
    stack.callback(setattr, *slot, mlp)
    setattr(*slot, DecodeMLP(mlp, tokens, threads, *modules))


def _slot_of(root: nn.Module, module: nn.Module) -> Slot:
    """Finds where `module` hangs under `root`."""
    return next(Slot(m, name) for m in root.modules() for name, child in m.named_children() if child is module)


def _start(linear: nn.Linear, rule: Rule) -> Tensor | None:
    """Adds the layer's own bias and the rule's."""
    biases = [b.detach().float() for b in (linear.bias, rule.bias) if b is not None]
    return sum(biases[1:], biases[0].to(linear.weight.device)) if biases else None
