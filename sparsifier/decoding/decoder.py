"""Decodes under a plan: one token at a time goes through the kernels, so that what rests is not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.batches import in_batches
from resting.sparsifier.decoding.break_even import break_even, threads_for
from resting.sparsifier.decoding.contract import DTYPES, cutoff_of, input_major, keep_in_order, weight_of
from resting.sparsifier.decoding.gated import DecodeMLP, can_gate
from resting.sparsifier.decoding.neurons import check_scores, decoding_neurons
from resting.sparsifier.decoding.products import columns
from resting.sparsifier.decoding.stand_in import DecodeStandIn, start_of
from resting.sparsifier.decoding.step.by_step import by_step, known_form, say_once
from resting.sparsifier.decoding.step.following import StepTracker
from resting.sparsifier.decoding.step.running import UnknownFormError
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.installing import installed
from resting.sparsifier.layers import SparseLinear
from resting.sparsifier.masking import Masking
from resting.sparsifier.neurons.sequence import check_prompt
from resting.sparsifier.plan import Plan
from resting.sparsifier.policy import AllButFirst, TokenPolicy
from resting.sparsifier.projection import Projection
from resting.sparsifier.quantised.model import check_plan, format_of
from resting.sparsifier.roles import ACT, MLP
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site, Slot
from resting.sparsifier.token_tracker import TokenTracker
from resting.sparsifier.transform import merged, merged_rules


class DecodeLinear(DecodeStandIn):
    """Runs a linear layer at decode: the kernel for one sparse token, the masked definition for anything else.

    A prompt also tells how much rests. Where that is below the measured break-even of this shape, the layer computes
    what it masks densely, so that no plan is slower than the dense model.

    Parameters
    ----------
    masked : SparseLinear
        The definition; the layer that it stands for keeps its weights input-major from now on.
    threads : int
    has_zeros : bool
        Whether the input has many exact zeros, whatever the rule.
    """

    stands_for = "linear"

    def __init__(self, masked: SparseLinear, threads: int, has_zeros: bool = False) -> None:
        super().__init__()
        self.masked = in_batches(masked)
        assert isinstance(masked.tokens, TokenTracker)
        self._tokens = masked.tokens
        self.linear = masked.linear
        self.rule = masked.rule
        self.matrix = Projection.of(self.linear)
        self.threads = threads_for(self.matrix.weight, threads)
        self._rests = has_zeros or not self.rule.masks_nothing
        self.pays = self._rests or break_even(self.matrix.weight, threads) == 0.0
        self._masking = Masking(self.rule)
        self._bias = start_of(self.matrix, self.rule)
        if self.pays:
            self._lay_out()

    def _lay_out(self) -> None:
        """Keeps the weights input-major, as the kernel reads them: those of a rule in a copy of their own."""
        cutoff_of(self.rule, self.matrix.weight.dtype)  # what no kernel takes is refused before anything moves
        if self.rule.weight is not None:
            weight = input_major(weight_of(self.matrix, self.rule))
        else:
            if not self.matrix.transposed:
                keep_in_order(self.linear.weight, input_major)
            weight = self.matrix.weight
        self._product = columns(weight, self.rule, self._bias, self.threads)

    def forward(self, x: Tensor) -> Tensor:
        if self._tokens.is_decoding and self.pays:
            return self._product(x)
        if not self._tokens.is_decoding:
            self._decide(x)
        return self.masked(x)

    def _decide(self, x: Tensor) -> None:
        """Chooses the kernel or the dense product by the share of the weights that a prompt's inputs let rest."""
        if x.shape[-2] == 1 or not self._rests:
            return
        rests = 1.0 - float((self._masking(x) != 0).float().mean())
        weight = self.matrix.weight
        pays = saved(self.rule, weight, rests) >= break_even(weight, self.threads)
        if pays != self.pays:
            self.pays = pays
            if pays:
                self._lay_out()
            else:
                restore_order(self.linear)


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
        keep_in_order(linear.weight, input_major)
        self._features = linear.in_features
        self._product = columns(linear.weight, Rule(), linear.bias, threads_for(linear.weight, threads))

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x) if x.numel() == self._features else self.linear(x)


@contextmanager
def decoding(
    plan: Plan, model: nn.Module, tokens: TokenPolicy = AllButFirst(1), threads: int | None = None
) -> Iterator[nn.Module]:
    """Makes `model` decode under `plan` with kernels that do not read what rests, inside the ``with`` block.

    Prompts, batches and tokens that the policy keeps dense go through the masked definition, as under `Plan.applied`;
    on a GPU, batches of two to four go through kernels where these were measured to be faster (`batches`).
    One sparse token at a time goes through a step of the whole model, where its blocks have a form that is known
    (`step.form`): on a GPU one CUDA graph, on a CPU compiled code. Other models decode by the kernels of single
    layers, and say so once. Weights are kept input-major inside the block, in place of their usual order and not
    beside it, so that no second copy is held; weights that are written to are read again.

    A plan with a transform runs on weights of its own, with the residual stream rotated (`transform.merged`): a second
    copy of the model's matrices. One with adapters decodes by the kernels of single layers. In 16 bits a rotated stream
    rounds more than `Plan.applied` does.

    Neuron masks that stay for a sequence, static ones and those from a prompt, are part of the step on a CPU, and so
    are thresholds on the output of up and codebooks with a head. Elsewhere those that stay decode by a copy of the rows
    and columns that are kept, all else runs as in the dense model, and the others are refused.

    Of a quantised model (`quantise`) a step reads the codes, where there are kernels for their format; what decodes
    otherwise takes the numbers that they stand for, and says so once.

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
        As `Plan.applied` and `Plan.check_plain`; also if a plan rewrites the weights of a quantised model.
    UnsupportedModelError
        If the model cannot take the plan's transform.
    """
    threads = torch.get_num_threads() if threads is None else threads
    plan.check_plain("decoded")
    decoder = plan.check(model)
    check_plan(model, plan)
    tracker = StepTracker(tokens)
    with ExitStack() as stack:
        adapters = 0
        if plan.transform is not None:
            adapters = plan.transform.adapters
            _check_digits(plan, decoder)
            stack.enter_context(merged(plan.transform, model, decoder))
            plan = replace(plan, rules=merged_rules(plan.transform, plan.rules), transform=None)
        if plan.needs_prompt:
            check_prompt(tokens, plan.method)
        has_step = not plan.neurons or (_is_on_cpu(decoder) and format_of(model) is None)
        check_scores(plan, has_step)
        form = known_form(model, decoder, adapters) if has_step else None
        stack.callback(tracker.watch(decoder.trunk).remove)
        if form is not None:
            try:
                stack.enter_context(by_step(plan, model, decoder, form, tracker, threads))
            except UnknownFormError as error:
                say_once(f"the plan decodes by the kernels of single layers, which is slower: {error}")
            else:
                yield model
                return
        if plan.neurons:
            stack.enter_context(decoding_neurons(plan, decoder, tracker))
            _say_dequantised(model, "rows and columns of neurons are copied from weights")
            yield model
            return
        _say_dequantised(model, "single layers have no kernel from codes")
        # A site without a rule may still be faster through the kernel.
        rules = {site: Rule() for site in decoder.sites() if not site.is_expert} | plan.rules
        gated = [site for site in plan.rules if site.role == ACT and can_gate(decoder, site)]
        rows = {under for act in gated for under in decoder.rests_under_act(act) if under.role != "down"}
        with_zeros = {site._replace(role="down") for site in plan.rules if site.role == ACT} | decoder.after_zeros
        for site, layer in stack.enter_context(installed(decoder, rules, tracker)).items():
            if isinstance(layer, SparseLinear) and site not in rows and not site.is_expert:
                _swap(stack, decoder, site, DecodeLinear(layer, threads, site in with_zeros))
        for act in gated:
            _swap_mlp(stack, decoder, act, tracker, threads)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Linear) and break_even(head.weight, threads) == 0.0:
            slot = _slot_of(model, head)
            stack.callback(setattr, *slot, head)
            stack.callback(restore_order, head)
            setattr(*slot, DecodeHead(head, threads))
        yield model


def _is_on_cpu(decoder: Decoder) -> bool:
    """Tells whether a model lies on a CPU, in a dtype of its kernels."""
    weight = decoder.projection(decoder.sites()[0]).weight
    return weight.device.type == "cpu" and weight.dtype in DTYPES["cpu"]


def _say_dequantised(model: nn.Module, why: str) -> None:
    """Says, of a quantised model, that it decodes without its codes."""
    if format_of(model) is not None:
        say_once(f"{type(model).__name__} decodes with the numbers that its codes stand for: {why}")


def _check_digits(plan: Plan, decoder: Decoder) -> None:
    """Refuses a rotated residual stream in half precision: huge channels, once rotated, leave no digits to others."""
    dtype = next(decoder.layers.parameters()).dtype
    if plan.transform is not None and plan.transform.rotations and dtype != torch.float32:
        raise SparsifierError(
            f"{plan.method} rotates the residual stream, which {str(dtype)[6:]} rounds too coarsely: decoding it is "
            "possible in float32 alone"
        )


def _swap(stack: ExitStack, decoder: Decoder, site: Site, layer: DecodeLinear) -> None:
    slot = decoder.slots[site]
    stack.callback(restore_order, layer.linear)
    stack.callback(slot.put, slot.module)
    slot.put(layer)


def restore_order(linear: Any) -> None:
    """Puts the weights of a layer back into their usual order."""
    keep_in_order(linear.weight, Tensor.contiguous)


def _swap_mlp(stack: ExitStack, decoder: Decoder, act: Site, tokens: TokenTracker, threads: int) -> None:
    slots = {s.role: decoder.slots[s] for s in (act, *(act._replace(role=role) for role in MLP)) if s in decoder.slots}
    mlp = slots["down"].parent
    slot = _slot_of(decoder.layers[act.block], mlp)
    stack.callback(setattr, *slot, mlp)
    setattr(*slot, DecodeMLP(mlp, tokens, threads, {role: found.module for role, found in slots.items()}))


def _slot_of(root: nn.Module, module: nn.Module) -> Slot:
    """Finds where `module` hangs under `root`."""
    return next(Slot(m, name) for m in root.modules() for name, child in m.named_children() if child is module)
