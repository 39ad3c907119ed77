"""A decoded token of a whole model on a GPU: few launches, captured as a CUDA graph and replayed for every token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.cuda_forms import USUAL
from resting.sparsifier.decoding.cuda_products import CudaColumns, InputNorm
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.step.ahead import Ahead
from resting.sparsifier.decoding.step.compiled_block import Blocks
from resting.sparsifier.decoding.step.cuda_block import Products, Rules, gain_of
from resting.sparsifier.decoding.step.form import ModelForm
from resting.sparsifier.decoding.step.graph import captured, seconds_of
from resting.sparsifier.decoding.step.side_by_side import SideBySide
from resting.sparsifier.decoding.step.store import Store
from resting.sparsifier.quantised.model import codes_of
from resting.sparsifier.rule import Rule


class CudaStep:
    """Decodes one token after another with the weights of a model, under the rules of a plan.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its weights are kept input-major from now on, in place of their usual order; those of a quantised one stay, and
        its codes are read.
    form : ModelForm
    decoder : Decoder
    rules : dict of Site to Rule
    store : Store
    rests : float
        Share of the weights that a token is expected not to read, in [0, 1]: what layouts are chosen for.

    Attributes
    ----------
    kernels : dict of str to int
        How many blocks run in which form, and why others are not compiled.

    Raises
    ------
    SparsifierError
        If a rule has no kernel.
    """

    def __init__(
        self, model: Any, form: ModelForm, decoder: Decoder, rules: Rules, store: Store, rests: float = USUAL
    ) -> None:
        self.store, self._rests = store, rests
        self.kernels: dict[str, int] = {}
        self._model, self._form, self._decoder, self._rules = model, form, decoder, rules
        self._laid_out: list[SideBySide] = []
        self._step: _Step | None = None
        self._replay: Callable[[], object] | None = None
        self._tables: dict[str, tuple[Tensor, ...]] = {}
        device = next(model.parameters()).device
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._next = -1
        self._compiled: bool | None = None
        self._ahead = Ahead(device) if device.type == "cuda" else None
        store.quiet = self.wait
        self._lay_out()

    @torch.inference_mode()
    def __call__(self, token: Tensor, past: int) -> Tensor:
        """Computes the logits [1, 1, vocabulary] after a token [1, 1] with `past` others before it."""
        if self._ahead is None:
            return self.compute(token, past)
        if not self._ahead.has(token, past):
            self.compute(token, past)
        logits, place = self.logits.clone(), past + 1
        run = partial(self.compute, past=place) if place < self.store.places else None
        self._ahead.begin(logits, place, run)
        return logits

    @torch.inference_mode()
    def compute(self, token: Tensor, past: int) -> Tensor:
        """Computes the same, and begins nothing ahead."""
        self._token.copy_(token)
        self._prepare(past)
        if past != self._next:
            self._at.fill_(past)
        self._next = past + 1
        assert self._replay is not None
        self._replay()
        return self.logits

    def wait(self) -> None:
        """Makes the current stream wait for what was begun ahead, which writes into the store."""
        if self._ahead is not None:
            self._ahead.wait()

    def renew(self) -> None:
        """Reads the weights again, which were written to."""
        self.restore()
        self._lay_out()

    def restore(self) -> None:
        """Lets go of the graph and the products, and puts the weights back into their usual order."""
        self.wait()
        self._captured, self._replay, self._step, self._tables = -1, None, None, {}
        self.logits = self._token.new_empty(0)
        for laid_out in self._laid_out:
            laid_out.restore()
        self._laid_out.clear()

    def _lay_out(self) -> None:
        """Makes the products; what was laid out is put back if one of them has no kernel."""
        self._captured = -1
        try:
            self._step = _Step(
                self._model,
                self._form,
                self._decoder,
                self._rules,
                self._laid_out,
                self._rests,
                self._compiled is not False,
            )
            self.kernels = self._step.blocks.kernels
        except BaseException:  # Ctrl-C too
            self.restore()
            raise

    def _prepare(self, past: int) -> None:
        """Captures the step, anew where the store has moved; trials before it write to place `past` alone."""
        if self._captured == self.store.version:
            return
        self._capture(past)
        if self._compiled is None:
            self._choose(past)

    def _choose(self, past: int) -> None:
        """Keeps compiled blocks where the whole step is faster with them: single launches do not add up to it."""
        assert self._step is not None
        blocks = self._step.blocks
        like = self._model.get_input_embeddings().weight
        if not blocks.are_chosen or not is_timed(like.device):
            self._compiled = True
            return

        def seconds(compiled: bool) -> float:
            self._change(compiled, past)
            assert self._replay is not None
            return seconds_of(self._replay, self._at.device, partial(self._at.fill_, past))

        of = f"{sorted(set(blocks.launches))} {_kinds(self._rules)} {like.dtype}, {self._rests:.2f} at rest"
        what = f"{len(blocks.blocks)} blocks, {of}"
        wins = remembered("step", what, like.device, lambda: bool(seconds(True) < seconds(False)))
        self._change(wins, past)

    def _change(self, compiled: bool, past: int) -> None:
        """Makes the step with or without compiled blocks, unless that is what it has."""
        has = self._compiled is not False
        self._compiled = compiled
        if compiled != has:
            # The weights are laid out anew, and stay when this step is gone: they stay what they were made as.
            with torch.inference_mode(next(self._model.parameters()).is_inference()):
                self.restore()
                self._lay_out()
            self._capture(past)

    def _capture(self, past: int) -> None:
        self._tables = {
            name: tuple(t.contiguous() for t in table(torch.arange(self.store.places, device=self._at.device)))
            for name, table in self._form.tables.items()
        }
        self._replay = captured(self._forward, self._at.device, partial(self._at.fill_, past))
        self._captured = self.store.version
        self._next = -1

    def _forward(self) -> None:
        assert self._step is not None
        self.logits = self._step(self._token, self._at, self.store, self._tables)
        self._at += 1


def is_timed(device: torch.device) -> bool:
    """Tells whether forms are chosen by their times: kernels that run on the processor in tests are not."""
    return device.type == "cuda"


def _kinds(rules: Rules) -> list[str]:
    """Names what rules have beside a threshold, which one form may be slower at than another."""
    parts = ("low_rank", "scale", "shift", "bias", "weight")
    return sorted(
        {f"{site.role}: {', '.join(part for part in parts if _is_vector(rule, part))}" for site, rule in rules.items()}
    )


def _is_vector(rule: Rule, part: str) -> bool:
    value = getattr(rule, part)
    return value is not None and not isinstance(value, int | float)


class _Step(nn.Module):
    """Computes a token: its embedding, the blocks, the last norm and the output layer."""

    def __init__(
        self,
        model: Any,
        form: ModelForm,
        decoder: Decoder,
        rules: Rules,
        laid_out: list[SideBySide],
        rests: float,
        compiled: bool,
    ) -> None:
        super().__init__()
        self.form = form
        embedding = model.get_input_embeddings()
        self.embedding = [embedding]  # in a list: its weights are the model's, not a part of this
        self.blocks = Blocks(embedding.weight, form, rests, compiled)
        quantised = codes_of(model, decoder)
        codes = None if quantised is None else quantised[1]
        for i in range(len(form.blocks)):
            products = Products(decoder, i, rules, rests, codes)
            try:
                self.blocks.add(i, products, decoder)
            finally:
                laid_out += products.laid_out
        output = model.get_output_embeddings()
        head = SideBySide([output])
        laid_out.append(head)
        bias = None if output.bias is None else output.bias.detach().float()
        self.head = CudaColumns(head.weight, [(head.widths[0], Rule())], bias, reads_all=True)
        self.gain = gain_of(form.norm)

    def forward(self, token: Tensor, at: Tensor, store: Store, tables: dict[str, tuple[Tensor, ...]]) -> Tensor:
        form = self.form
        x = self.embedding[0](token)
        if form.embedding_scale != 1.0:
            x = x * form.embedding_scale
        x, squares = self.blocks(x, at, store, tables)
        norm = InputNorm(squares, self.gain, form.norm.eps, form.norm.rounds_first)
        logits, _ = self.head.fused(x, norm)
        return form.finished(logits)
