"""A decoder block for one token by compiled kernels, whose products add to one residual stream; and all blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.contract import cutoff_of
from resting.sparsifier.decoding.cuda.choice import (
    COMPILED,
    FORMS,
    SLOWER,
    SLOWER_AS_A_STEP,
    Form,
    Launch,
    chosen_form,
    in_triton,
)
from resting.sparsifier.decoding.cuda.codes import Codes, side_by_side
from resting.sparsifier.decoding.cuda.codes_choice import CodesForm, chosen_codes
from resting.sparsifier.decoding.cuda.compiled import missing
from resting.sparsifier.decoding.cuda.products import VotingColumns, check_widths
from resting.sparsifier.decoding.cuda.rows import VotingRows, check_rows
from resting.sparsifier.decoding.cuda.stream import Stream
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.decoding.cuda.variant import GATED, NORMED, PLAIN
from resting.sparsifier.decoding.cuda_norm import ACTIVATIONS
from resting.sparsifier.decoding.cuda_quantised import QuantisedColumns
from resting.sparsifier.decoding.cuda_quantised_layout import check
from resting.sparsifier.decoding.step.cuda_block import Attention, CudaBlock, Products, gain_of
from resting.sparsifier.decoding.step.form import BlockForm, ModelForm, Norm
from resting.sparsifier.decoding.step.reading import roles_of
from resting.sparsifier.decoding.step.store import Store
from resting.sparsifier.errors import SparsifierError

SAMPLE = 1024
"""Rows of the embedding whose magnitude is looked at."""


class Places:
    """Holds the sums between products, which all blocks of the same widths share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: dict[tuple[str, int], Sums] = {}

    def __call__(self, name: str, width: int) -> Sums:
        key = name, width
        if key not in self._of:
            self._of[key] = Sums(width, 1.0, self._device)
        return self._of[key]


class CompiledBlock(nn.Module):
    """Computes a block for one token: five launches, or six under a mask of the activated gate.

    Parameters
    ----------
    form : BlockForm
    products : Products
    roles : tuple of str
        Of the block's matrices.
    stream : Stream
    places : Places
    how : Form or CodesForm
        The tiles of its products; of codes their layouts.

    Raises
    ------
    SparsifierError
        With the reason if there are no compiled kernels for such a block. Nothing has moved then.
    """

    def __init__(
        self,
        form: BlockForm,
        products: Products,
        roles: tuple[str, ...],
        stream: Stream,
        places: Places,
        how: Form | CodesForm,
    ) -> None:
        super().__init__()
        act, stored = products.act, products.weight("o")
        qkv, opened = _roles(products, roles)
        activation = ACTIVATIONS.index(form.activation) + 1
        first, second = places("qkv", sum(products.widths(*qkv))), places("opened", sum(products.widths(*opened)))
        before, after = (_normed(stream, norm) for norm in (form.before_attention, form.before_mlp))

        def columns(names: tuple[str, ...], taken: Input, **more: Any) -> VotingColumns:
            reads_all, widths = products.reads_all(*names), products.widths(*names)
            launch = taken.kind, products.weight(names[0]).shape[1], sum(widths), not reads_all
            weight: Tensor | Codes
            if isinstance(how, CodesForm):
                lane_bytes, tile = how.layout(*launch)
                weight = side_by_side(products.held(*names), stored.dtype, lane_bytes)
                layers, bias = list(zip(widths, map(products.rule, names))), products.together(*names)
            else:
                weight, layers, bias, _ = products.side_by_side(*names)
                tile = how.tile(*launch)
            return VotingColumns(weight, layers, bias, taken, reads_all=reads_all, tile=tile, **more)

        self.qkv = columns(qkv, before, place=first, zeros=second)
        self.attention = Attention(form.attention, stored.device)
        self.o = columns(("o",), Input(), into=stream.sums, scale=form.residual)
        self.opened = columns(opened, after, place=second, zeros=first)
        taken, self.rows = Input(self.opened.sums, gated=activation), None
        if act is not None:
            cutoff = cutoff_of(act, stored.dtype)
            up, bias = products.weight("up"), products.start("up")
            self.rows = VotingRows(up, cutoff, bias, after, self.opened.sums, activation)
            taken = Input()
        self.down = columns(("down",), taken, into=stream.sums, scale=form.residual)

    def forward(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> None:
        """Adds to the residual stream what the block adds; parameters are those of `CudaBlock`."""
        self.qkv()
        sums = self.qkv.sums
        y = self.attention(sums.words[None, : sums.count], keys, values, cos, sin, at, sums.unit)
        self.o(y)
        self.opened()
        self.down(None if self.rows is None else self.rows())


class Blocks(nn.Module):
    """Holds the blocks of a model, each in the form that it has, and its residual stream.

    Parameters
    ----------
    embedding : Tensor [vocabulary, width]
    form : ModelForm
    rests : float
        Share of the weights that a token is expected not to read.
    compiled : bool
        Whether compiled blocks are wanted.
    """

    def __init__(self, embedding: Tensor, form: ModelForm, rests: float, compiled: bool = True) -> None:
        super().__init__()
        self.form, self._rests = form, rests
        self.blocks = nn.ModuleList()
        self._counts: Counter[str] = Counter()
        self._why = missing(embedding.device) if compiled else SLOWER_AS_A_STEP
        if self._why is None and embedding.dtype not in (torch.bfloat16, torch.float16):
            self._why = "compiled kernels take bfloat16 and float16"
        self.launches: list[Launch] = []
        if self._why is None:
            typical = float(embedding.detach()[:SAMPLE].float().square().mean().sqrt()) * form.embedding_scale
            self._stream = Stream(embedding.shape[1], typical, embedding.dtype, embedding.device)
            self._places = Places(embedding.device)

    @property
    def kernels(self) -> dict[str, int]:
        """Tells how many blocks run in which form, and why others are not compiled."""
        return dict(self._counts)

    @property
    def are_chosen(self) -> bool:
        """Tells whether blocks of plain weights are compiled, which could be in Triton as well."""
        return self._counts[COMPILED] > 0

    def add(self, i: int, products: Products, decoder: Decoder) -> None:
        """Makes block `i`, in the form that was faster; in Triton where there is no other."""
        form, roles = self.form.blocks[i], roles_of(decoder, i)
        if products.codes is not None:
            self._add_quantised(form, products, roles)
            return
        reason, how = self._why, None
        if reason is None:
            try:
                check_block(form, products, roles)
                launches = [launch for _, launch in _launches(products, roles)]
                how = chosen_form(launches, products.weight("o"), self._rests)
                self.launches += launches
                reason = None if how.wins else SLOWER
            except SparsifierError as error:
                reason = str(error)
        name = COMPILED if reason is None else in_triton(reason)
        self._counts[name] += 1
        FORMS[f"blocks, {name}"] += 1
        if reason is not None or how is None:
            self.blocks.append(CudaBlock(form, products, roles))
            return
        self.blocks.append(CompiledBlock(form, products, roles, self._stream, self._places, how))

    def _add_quantised(self, form: BlockForm, products: Products, roles: tuple[str, ...]) -> None:
        how = self._codes_form(form, products, roles)
        if how is not None:
            name = f"{products.held('o')[0].format.name}, voting"
            self.blocks.append(CompiledBlock(form, products, roles, self._stream, self._places, how))
        else:
            block = CudaBlock(form, products, roles)
            assert isinstance(block.down, QuantisedColumns)
            name = f"{block.down.shape.kernel}, {block.down.how}"
            self.blocks.append(block)
        self._counts[name] += 1
        FORMS[f"blocks, {name}"] += 1

    def _codes_form(self, form: BlockForm, products: Products, roles: tuple[str, ...]) -> CodesForm | None:
        """Chooses how codes are multiplied by programs that vote; None where another form is faster or the only one."""
        if self._why is not None or products.act is not None:
            return None
        try:
            check_block(form, products, roles)
            check_codes(products, roles)
        except SparsifierError:
            return None
        launches = [launch for _, launch in _launches(products, roles)]
        how = chosen_codes(launches, products.held("o")[0].format, products.weight("o"), self._rests)
        return how if how.wins else None

    def forward(
        self, x: Tensor, at: Tensor, store: Store, tables: dict[str, tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor]:
        """Gives the residual stream [1, 1, width] after all blocks, and sums of its squares."""
        squares: Tensor | None = None
        is_stored = True
        for i, block in enumerate(self.blocks):
            cos, sin = tables[self.form.blocks[i].attention.table]
            memory = store.keys[i], store.values[i], cos, sin, at
            if isinstance(block, CompiledBlock):
                if is_stored:
                    self._stream.begin(x)
                    is_stored = False
                block(*memory)
            else:
                if not is_stored:
                    x, squares = self._stream.finish()
                    is_stored = True
                if squares is None:
                    squares = x.float().square().sum()[None]
                x, squares = block(x, squares, *memory)
        if not is_stored:
            return self._stream.finish()
        return x, x.float().square().sum()[None] if squares is None else squares


def check_block(form: BlockForm, products: Products, roles: tuple[str, ...]) -> None:
    """Refuses a block that compiled kernels do not compute.

    Raises
    ------
    SparsifierError
        With the reason, as one sentence.
    """
    if form.after_attention is not None or form.after_mlp is not None:
        raise SparsifierError("compiled products add to the residual stream, and here a norm comes before it")
    if form.before_attention is None or form.before_mlp is None:
        raise SparsifierError("compiled blocks have a norm before attention and before the MLP")
    for names, (kind, inputs, _, _) in _launches(products, roles):
        check_widths(inputs, products.widths(*names), kind == NORMED)
        for name in names:
            cutoff_of(products.rule(name), products.weight("o").dtype)
    if products.act is not None:
        if not products.rule("up").masks_nothing or products.rule("up").low_rank is not None:
            raise SparsifierError("compiled rows of up have no mask of their own")
        check_rows(products.weight("up"))


def check_codes(products: Products, roles: tuple[str, ...]) -> None:
    """Refuses codes that programs do not take which vote.

    Raises
    ------
    SparsifierError
        With the reason, as one sentence.
    """
    weights = products.held(*roles)
    if len({weight.format for weight in weights}) > 1:
        raise SparsifierError("layers of a block have codes of one format here")
    check(weights[0].format)
    if any(products.rule(name).low_rank is not None or products.rule(name).weight is not None for name in roles):
        raise SparsifierError(
            "programs that vote have no low-rank part beside codes, and rules no weights of their own"
        )


def _roles(products: Products, roles: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Gives the layers that read the norm before attention, and those that read the one before the MLP."""
    opened = ("gate_up",) if "gate_up" in roles else ("gate", "up") if products.act is None else ("gate",)
    return ("qkv",) if "qkv" in roles else ("q", "k", "v"), opened


def _launches(products: Products, roles: tuple[str, ...]) -> list[tuple[tuple[str, ...], Launch]]:
    """Lists the layers of each launch, and what a form is chosen by."""
    qkv, opened = _roles(products, roles)
    last = GATED if products.act is None else PLAIN
    return [
        (
            names,
            (kind, products.weight(names[0]).shape[1], sum(products.widths(*names)), not products.reads_all(*names)),
        )
        for names, kind in ((qkv, NORMED), (("o",), PLAIN), (opened, NORMED), (("down",), last))
    ]


def _normed(stream: Stream, norm: Norm | None) -> Input:
    assert norm is not None
    return Input(stream.sums, gain_of(norm), norm.eps, norm.rounds_first)
