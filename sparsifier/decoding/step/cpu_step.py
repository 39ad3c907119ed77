"""Computes one decoded token of a model on a CPU in one call of compiled code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.contract import cutoff_of
from resting.sparsifier.decoding.cpu_quantised_layout import check
from resting.sparsifier.decoding.step import cpu_table as ops
from resting.sparsifier.decoding.step.cpu_kernels import KINDS
from resting.sparsifier.decoding.step.cpu_neurons import CpuNeurons
from resting.sparsifier.decoding.step.cpu_program import FLOAT, CpuProgram
from resting.sparsifier.decoding.step.cpu_weights import CpuWeights
from resting.sparsifier.decoding.step.form import BlockForm, ModelForm, Norm
from resting.sparsifier.decoding.step.reading import roles_of
from resting.sparsifier.decoding.step.store import Store
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.neurons.mask import NeuronMask
from resting.sparsifier.quantised.model import codes_of, head_codes_of
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site

FIRST_POSITIONS = 256
"""Of a rotary table; it doubles as it is needed."""


class CpuStep:
    """Computes one decoded token of a model on a CPU: all of its blocks in one call of compiled code.

    Weights are kept in the order that the kernels read, in place of their usual one. Those of a quantised model stay as
    they are, for prompts, and its codes are read, where its format has a kernel.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In float32 or bfloat16.
    form : ModelForm
        Of `model`.
    decoder : Decoder
        Of `model`.
    rules : dict of Site to Rule
        Of a plan; sites without a rule are dense.
    store : Store
        Of keys and values, written at the place of every token.
    threads : int
        Of every product; one that is faster on one thread takes one.
    masks : dict of Site to NeuronMask, optional
        Of neurons.

    Attributes
    ----------
    kernels : dict of str to int
        Of a quantised model, how many blocks read codes of which format, or why they read none.
    reason : str
        Why the codes of a quantised model are not read; else empty.

    Raises
    ------
    SparsifierError
        As `CpuWeights` and `CpuNeurons`; also if weights are not those that a quantised model's codes stand for any
        more.
    """

    def __init__(
        self,
        model: Any,
        form: ModelForm,
        decoder: Decoder,
        rules: Mapping[Site, Rule],
        store: Store,
        threads: int,
        masks: Mapping[Site, NeuronMask] | None = None,
    ) -> None:
        self.store = store
        self._form, self._decoder, self._threads = form, decoder, threads
        self._model, self._rules = model, rules
        self.neurons = CpuNeurons(masks or {}, decoder, model.get_output_embeddings().weight.dtype)
        self._embed: nn.Module = model.get_input_embeddings()
        self.kernels: dict[str, int] = {}
        self.reason = ""
        self._weights = self._taken()
        try:
            self.renew()
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def __call__(self, token: Tensor, past: int) -> Tensor:
        """Computes the logits after one token, and writes its keys and values into the store.

        Parameters
        ----------
        token : Tensor [1, 1]
        past : int
            Its place, which is how many tokens came before it.

        Returns
        -------
        Tensor [1, 1, vocabulary]
            The next call overwrites it.

        Raises
        ------
        SparsifierError
            If the store has no place for it.
        """
        if self.store.version != self._version:
            self._attach()
        if past >= self._positions:
            self._reach(past)
        embedded = self._embed(token)
        if self._form.embedding_scale != 1.0:
            embedded = embedded * self._form.embedding_scale
        self._x.copy_(embedded.view(-1))
        self._run(*self._program, past, self._order, *self._scratch, self._scores)
        if self._form.logits_divisor != 1.0:
            self._logits.div_(self._form.logits_divisor)
        if self._form.logits_softcap:
            self._logits.div_(self._form.logits_softcap).tanh_().mul_(self._form.logits_softcap)
        return self._logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Reads the weights again, after they were changed or exchanged."""
        self._release()
        self._weights = self._taken()
        self._weights.lay_out()
        self._write()

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back into their usual order; the step is not to be called again before `renew`."""
        self._release()
        self._weights.restore()

    def _taken(self) -> CpuWeights:
        """Takes the weights as they are now, and the codes of a quantised model."""
        codes = head = None
        if found := codes_of(self._model, self._decoder):
            form, stored = found
            name = form.stored.name
            try:
                check(form)
            except SparsifierError as error:
                self.reason = str(error)
                name = f"{name} dequantised: {error}"
            else:
                codes, head = stored, head_codes_of(self._model)
            self.kernels = {name: self._decoder.blocks}
        return CpuWeights(self._model, self._decoder, self._rules, self.neurons.by_rows, codes, head)

    def _release(self) -> None:
        """Lets go of weights, so that they are not held twice while they are put into another order."""
        self._program: list[np.ndarray] = []
        self._writer: CpuProgram | None = None

    def _write(self) -> None:
        """Writes the program."""
        weights, form, attention = self._weights, self._form, [b.attention for b in self._form.blocks]
        output = weights.output()
        vocabulary, width = output.weight.shape
        program = CpuProgram(weights.dtype, self._threads)
        self._x = torch.zeros(width)
        self._logits = torch.zeros(1, 1, vocabulary, dtype=weights.dtype)
        heads = max((a.heads + 2 * a.groups) * a.size for a in attention)
        gates = max(self._decoder.projection(Site(i, "down")).in_features for i in range(len(attention)))
        at = {"x": program.hold(self._x), "h": program.buffer(width), "y": program.buffer(width)}
        at |= {"heads": program.buffer(heads), "seen": program.buffer(heads), "gate": program.buffer(2 * gates)}
        at["opened"] = program.buffer(gates)
        for i, block in enumerate(form.blocks):
            roles = set(roles_of(self._decoder, i))
            self._write_attention(program, i, block, roles, at, width)
            self._write_mlp(program, i, block, roles, at, width)
        program.norm(form.norm, at["x"], at["h"], width)
        logits = program.hold(self._logits)
        if weights.dtype == torch.float32:
            program.product(output, at["h"], logits)
        else:
            wide = program.buffer(vocabulary)
            program.product(output, at["h"], wide)
            program.store(wide, logits, vocabulary)
        *self._program, self._scratch = program.finished()
        self._run = ops.runner(self._threads, weights.are_coded)
        self._writer = program
        self._positions = 0
        self._attach()

    def _normed(self, program: CpuProgram, norm: Norm | None, x: int, y: int, n: int) -> int:
        if norm is None:
            return x
        program.norm(norm, x, y, n)
        return y

    def _write_attention(
        self, program: CpuProgram, i: int, block: BlockForm, roles: set[str], at: dict[str, int], width: int
    ) -> None:
        form, weights, q = block.attention, self._weights, at["heads"]
        k = q + form.heads * form.size * FLOAT
        v = k + form.groups * form.size * FLOAT
        x = self._normed(program, block.before_attention, at["x"], at["h"], width)
        for role, y in (("q", q), ("k", k), ("v", v), ("qkv", q)):
            if role in roles:
                program.product(weights.matrix(Site(i, role)), x, y)
        for norm, y, heads in ((form.q_norm, q, form.heads), (form.k_norm, k, form.groups)):
            if norm is not None:
                n, count = (heads * form.size, 1) if form.norm_of_all else (form.size, heads)
                program.norm(norm, y, y, n, count)
        if form.rotary:
            program.turn(form.table, q, form.rotary, form.heads + form.groups, form.size)
        numbers = form.scaling, form.softcap
        program.attend(q, at["seen"], form.heads, form.groups, form.size, form.window, numbers)
        program.product(weights.matrix(Site(i, "o")), at["seen"], at["y"])
        y = self._normed(program, block.after_attention, at["y"], at["y"], width)
        program.add(y, at["x"], width, block.residual)

    def _write_mlp(
        self, program: CpuProgram, i: int, block: BlockForm, roles: set[str], at: dict[str, int], width: int
    ) -> None:
        weights = self._weights
        down, activation = weights.matrix(Site(i, "down")), KINDS[block.activation]
        x = self._normed(program, block.before_mlp, at["x"], at["h"], width)
        if self.neurons.masks(i):
            z = self.neurons.write(program, weights, i, activation, x, at)
        else:
            z = self._write_gate(program, i, roles, activation, x, at, down.weight.shape[1])
        program.product(down, z, at["y"])
        y = self._normed(program, block.after_mlp, at["y"], at["y"], width)
        program.add(y, at["x"], width, block.residual)

    def _write_gate(
        self, program: CpuProgram, i: int, roles: set[str], activation: int, x: int, at: dict[str, int], n: int
    ) -> int:
        """Writes gate and up, whose rows may rest under a mask of the activated gate; gives where their product is."""
        weights, act, gate = self._weights, self._weights.act_of(i), at["gate"]
        up = gate + n * FLOAT
        both = weights.matrix(Site(i, "gate_up" if "gate_up" in roles else "up"))
        if "gate" in roles:
            program.product(weights.matrix(Site(i, "gate")), x, gate)
        elif act is not None:
            program.rows(both, slice(0, n), x, gate)
        if act is None:
            program.product(both, x, up if "gate" in roles else gate)
        program.open(activation, gate, n)
        if act is None:
            program.multiply(gate, up, n)
            return up
        half = slice(0, n) if "gate" in roles else slice(n, 2 * n)
        program.gated(both, half, cutoff_of(act, weights.dtype), x, gate, at["opened"])
        return at["opened"]

    def _attach(self) -> None:
        """Points at the store's keys and values, which move when it grows."""
        assert self._writer is not None
        table, store = self._program[0], self.store
        for i, row in enumerate(self._writer.attentions):
            keys, values = store.keys[i], store.values[i]
            for kept in (keys, values):
                if kept.dtype != self._weights.dtype or not kept.is_contiguous() or kept.shape != keys.shape:
                    raise SparsifierError("a step takes a store of the model's dtype, in one run, all of one shape")
            table[row, [ops.KEYS, ops.VALUES, ops.STRIDE]] = keys.data_ptr(), values.data_ptr(), keys.stride(0)
        self._kept = [*store.keys, *store.values]
        self._length = min(keys.shape[1] for keys in store.keys)
        self._scores = np.empty(self._length, np.float32)
        self._order = np.arange(max(self._length, self._writer.longest))
        self._positions = min(self._positions, self._length)
        self._version = store.version

    def _reach(self, past: int) -> None:
        """Makes rotary tables reach the position `past`."""
        if past >= self._length:
            raise SparsifierError(f"the store has room for {self._length} tokens, none for the token at place {past}")
        assert self._writer is not None
        positions = min(self._length, max(FIRST_POSITIONS, 2 * past))
        table = self._program[0]
        self._turns = {}
        for name, rows in self._writer.turns.items():
            found = self._form.tables[name](torch.arange(positions))
            cos, sin = self._turns[name] = [t.float().contiguous() for t in found]
            for row in rows:
                table[row, [ops.COS, ops.SIN]] = cos.data_ptr(), sin.data_ptr()
        self._positions = positions
