"""One decoded token of a dense model by the library's products, of fixed shapes: for a compiler, and for a CUDA graph.

Only attention is the kernel that a sparse step has too, so that what differs between the two are their products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resting.benchmarks.latency.gpu.compiling import OVERLAPPING
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.step.cuda_block import Attention
from resting.sparsifier.decoding.step.form import ACTIVATIONS, BlockForm, ModelForm
from resting.sparsifier.decoding.step.graph import captured
from resting.sparsifier.decoding.step.reading import roles_of
from resting.sparsifier.sites import Site


class DenseStep(nn.Module):
    """Decodes one token after another with the weights of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Layers that read one input get views of one matrix from now on.
    form : ModelForm
    decoder : Decoder
    length : int
        Tokens that there is room for.
    """

    def __init__(self, model: Any, form: ModelForm, decoder: Decoder, length: int) -> None:
        super().__init__()
        device = model.get_output_embeddings().weight.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        places = torch.arange(length, device=device)
        self.tables = {name: tuple(t.contiguous() for t in table(places)) for name, table in form.tables.items()}
        self.entry = Entry(model.get_input_embeddings(), form.embedding_scale)
        self.exit = Exit(form, model.get_output_embeddings())
        self.names = [block.attention.table for block in form.blocks]
        blocks = [DenseBlock(block, decoder, i, length) for i, block in enumerate(form.blocks)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self) -> Tensor:
        """Compute logits [1, 1, vocabulary] after `token` at position `at`, which moves on by one."""
        x, more = self.entry(self.token)
        for block, name in zip(self.blocks, self.names):
            x, more = block(x, more, *self.tables[name], self.at)
        logits: Tensor = self.exit(x, more)
        self.at += 1
        return logits


class Entry(nn.Module):
    """Gives the embedding, and with it nothing to add, as a block takes it."""

    def __init__(self, embed: nn.Module, scale: float) -> None:
        super().__init__()
        self.embed, self.scale = embed, scale

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(token)
        if self.scale != 1.0:
            x = x * self.scale
        return x, torch.zeros_like(x)


class Exit(nn.Module):
    """Applies the last norm and the output layer."""

    def __init__(self, form: ModelForm, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head, self.finished = form.norm.module, head, form.finished

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.finished(self.head(self.norm(x + more)))


class DenseBlock(nn.Module):
    """Computes a block by the library's products, with what a compiler makes of the rest."""

    def __init__(self, form: BlockForm, decoder: Decoder, block: int, length: int) -> None:
        super().__init__()
        norms = form.before_attention, form.after_attention, form.before_mlp, form.after_mlp
        self.norms = nn.ModuleList(nn.Identity() if norm is None else norm.module for norm in norms)
        self.residual, self.activation = form.residual, ACTIVATIONS[form.activation]
        roles = roles_of(decoder, block)
        self.qkv, self.both = (
            _side_by_side(decoder, block, roles, fused, parts)
            for fused, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up")))
        )
        self.o, self.down = (decoder.linear(Site(block, role)) for role in ("o", "down"))
        weight = self.qkv[0]
        self.attention = Attention(form.attention, weight.device)
        shape = form.attention.groups, length, form.attention.size
        self.keys, self.values = (weight.new_zeros(shape) for _ in range(2))

    def forward(self, x: Tensor, more: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Give the residual stream, and what is to be added to it: a compiler adds it where it is read next."""
        before_attention, after_attention, before_mlp, after_mlp = self.norms
        x = x + more
        qkv = F.linear(before_attention(x), *self.qkv)
        y = self.o(self.attention(qkv[0], self.keys, self.values, cos, sin, at))
        x = x + self._scaled(after_attention(y))
        gate, up = F.linear(before_mlp(x), *self.both).chunk(2, -1)
        return x, self._scaled(after_mlp(self.down(self.activation(gate) * up)))

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.residual == 1.0 else y * self.residual


def _side_by_side(
    decoder: Decoder, block: int, roles: tuple[str, ...], fused: str, parts: tuple[str, ...]
) -> tuple[Tensor, Tensor | None]:
    """Lay the weights of layers that read one input side by side; the layers' own become views."""
    linears = [decoder.linear(Site(block, role)) for role in ((fused,) if fused in roles else parts)]
    if len(linears) == 1:
        return linears[0].weight.detach(), linears[0].bias
    weight = torch.cat([linear.weight for linear in linears]).detach()
    widths = [len(linear.weight) for linear in linears]
    for linear, part in zip(linears, weight.split(widths)):
        linear.weight.data = part
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [weight.new_zeros(n) if linear.bias is None else linear.bias for linear, n in zip(linears, widths)]
    return weight, torch.cat(biases).detach()


class GraphDecode:
    """Captures a dense step once and replays it for every token.

    Parameters
    ----------
    step : DenseStep
    ids : Tensor [1, prompt + steps]
        Tokens are forced, so that every model decodes the same text.
    prompt : int
        Tokens that are fed one by one and not timed.
    options : sequence of str, optional
        Of torch.compile, for the blocks, once for all of them; None where nothing is compiled.
    """

    def __init__(self, step: DenseStep, ids: Tensor, prompt: int, options: tuple[str, ...] | None) -> None:
        self.decoder, self.ids, self.prompt, self.position = step, ids, prompt, 0
        if options is not None:
            around = {option: True for option in options if option == OVERLAPPING}  # the output layer stays the same
            step.entry.compile(dynamic=False, options=around or None)
            step.exit.compile(dynamic=False, options=around or None)
            for block in step.blocks:
                block.compile(dynamic=False, options=dict.fromkeys(options, True) or None)
        self._replay = captured(self._forward, ids.device)

    def _forward(self) -> None:
        self.logits = self.decoder()

    def begin(self) -> None:
        """Start again, after the prompt."""
        self.decoder.at.zero_()
        self.position = 0
        for _ in range(self.prompt):
            self.step()

    def step(self, _: int = 0) -> Tensor:
        """Compute the logits of the next token, in the same memory every time."""
        self.decoder.token.copy_(self.ids[:, self.position : self.position + 1])
        self.position += 1
        self._replay()
        return self.logits
