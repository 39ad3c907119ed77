"""Finds what a transform has to rewrite: the norms that sites read, whatever they are called."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.roles import INPUT_OF
from resting.sparsifier.sites import Site

TOKENS = 6
"""Tokens of the forward in which norms are found."""
TOLERANCE = 2e-4
"""Of float32, relative to the largest number."""
KINDS = ("attention", "mlp")
"""What in a block reads the residual stream behind a norm."""


@dataclass(frozen=True)
class NormBefore:
    """Shows a norm whose output sites read.

    Attributes
    ----------
    module : nn.Module
    offset : float
        What the norm multiplies with is its weight plus this: 0, or 1 as in Gemma.
    """

    module: Any
    offset: float

    @property
    def gamma(self) -> Tensor:
        """Gives what it multiplies with, [d] in fp32, or in fp64 where the weight is."""
        weight = self.module.weight.detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset

    @property
    def neutral(self) -> Tensor:
        """Gives the weight under which it multiplies with 1."""
        return torch.full_like(self.module.weight.detach(), 1.0 - self.offset)


@dataclass(frozen=True)
class Call:
    """Holds what a block was called with: its tokens' hidden states first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Structure:
    """Holds what was seen of a model in one short forward.

    Attributes
    ----------
    calls : list of Call
        Of every block.
    inputs : dict of Site to Tensor
        What each linear site read.
    outputs : list of (block, module, input, output)
        Every module of every block, and with block -1 the modules beside the blocks.
    ends : list of Tensor
        What every block gave.
    """

    calls: list[Call]
    inputs: dict[Site, Tensor]
    outputs: list[tuple[int, nn.Module, Tensor | None, Tensor]]
    ends: list[Tensor]

    @classmethod
    def of(cls, model: Any, decoder: Decoder) -> Structure:
        """Runs `model` on a few tokens and takes note."""
        found = cls([], {}, [], [])
        blocks = {id(module): i for i, layer in enumerate(decoder.layers) for module in layer.modules()}
        layers = {id(layer) for layer in decoder.layers}

        def begin(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            hidden = args[0] if args else kwargs["hidden_states"]
            found.calls.append(Call((hidden, *args[1:]), rest))

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            output = first(output)
            if isinstance(output, Tensor):
                given = args[0] if args and isinstance(args[0], Tensor) else None
                found.outputs.append((blocks.get(id(module), -1), module, given, output))
                if id(module) in layers:
                    found.ends.append(output)

        def read(site: Site) -> Any:
            return lambda module, args: found.inputs.setdefault(site, args[0])

        with ExitStack() as stack, torch.no_grad(), evaluating(model):
            for layer in decoder.layers:
                stack.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for module in model.modules():
                if module not in (model, decoder.trunk, decoder.layers):
                    stack.callback(module.register_forward_hook(see).remove)
            for site in decoder.sites():
                if not site.part:
                    stack.callback(decoder.linear(site).register_forward_pre_hook(read(site)).remove)
            vocabulary = model.get_input_embeddings().weight
            ids = torch.arange(TOKENS, device=vocabulary.device)[None] % len(vocabulary)
            model(input_ids=ids, use_cache=False)
        return found

    def norm(self, decoder: Decoder, block: int, kind: str) -> NormBefore:
        """Finds the norm whose output attention or the MLP of `block` reads.

        Raises
        ------
        UnsupportedModelError
            If there is none, or it is of another form.
        """
        sites = readers(decoder, block, kind)
        read = [self.inputs[site] for site in sites if site in self.inputs]
        if not sites or len(read) < len(sites) or not all(same(x, read[0]) for x in read):
            raise UnsupportedModelError(f"block {block} has no {kind} whose matrices read one tensor")
        gave = [
            module
            for i, module, _, output in self.outputs
            if i == block and same(output, read[0]) and _is_vector(module, read[0])
        ]
        if len(set(gave)) != 1:
            raise UnsupportedModelError(f"block {block} has no norm whose output its {kind} reads")
        return norm_of(gave[0], f"block {block}'s norm before {kind}")

    def last_norm(self) -> NormBefore:
        """Finds the norm that reads what the last block gives.

        Raises
        ------
        UnsupportedModelError
        """
        end = self.ends[-1]
        beside = [(module, x) for i, module, x, _ in self.outputs if i < 0 and x is not None]
        found = {module for module, x in beside if same(x, end) and _is_vector(module, x)}
        if len(found) != 1:
            raise UnsupportedModelError("no norm reads what the last block gives")
        return norm_of(found.pop(), "the last norm")

    def check_ends(self, model: Any, last: NormBefore) -> None:
        """Makes sure that the blocks read the embedding, times a number, and the output layer the last norm.

        Raises
        ------
        UnsupportedModelError
        """
        gave = {id(module): (x, output) for _, module, x, output in self.outputs}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or id(head) not in gave or id(embedding) not in gave:
            raise UnsupportedModelError(f"{type(model).__name__} has no linear output layer that could be rotated")
        embedded, read = gave[id(embedding)][1].double(), self.calls[0].args[0].double()
        factor = (embedded * read).sum() / embedded.square().sum()
        if not off(factor * embedded, read) <= max(TOLERANCE, 4 * torch.finfo(head.weight.dtype).eps):
            raise UnsupportedModelError("what goes into the first block is not the embedding, times a number")
        into = gave[id(head)][0]
        if into is None or not torch.equal(into, gave[id(last.module)][1]):
            raise UnsupportedModelError("what the output layer reads is not what the last norm gives")


def readers(decoder: Decoder, block: int, kind: str) -> list[Site]:
    """Lists the sites of `block` that read the residual stream as attention, or as the MLP."""
    return [s for s in decoder.sites() if s.block == block and not s.part and INPUT_OF[s.role] == kind]


def norm_of(module: Any, name: str) -> NormBefore:
    """Finds out what a norm multiplies with, by trying it in float32.

    Raises
    ------
    UnsupportedModelError
        If it has more than a weight, or multiplies with something else.
    """
    numbers = {n: p.detach().float() for n, p in module.named_parameters()}
    if list(numbers) == ["weight"]:
        weight = numbers["weight"]
        x = torch.randn(TOKENS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        with torch.no_grad(), evaluating(module):
            given = functional_call(module, numbers, (x,))
            for offset in (0.0, 1.0):
                bare = functional_call(module, {"weight": torch.full_like(weight, 1.0 - offset)}, (x,))
                if off(bare * (weight + offset), given) <= TOLERANCE:
                    return NormBefore(module, offset)
    raise UnsupportedModelError(f"{name}, {type(module).__name__}, is no norm with one weight that can be folded")


def off(found: Tensor, wanted: Tensor) -> float:
    """Measures the largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-20))


def first(output: Any) -> Any:
    """Gives the hidden states of what a block or module gives."""
    return output[0] if isinstance(output, tuple) and output else output


def same(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors, both held, are one and the same."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype)


def _is_vector(module: nn.Module, x: Tensor) -> bool:
    """Tells whether a module has a weight of one number a channel, as norms have."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == x.shape[-1:]
