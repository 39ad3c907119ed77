"""Searches parameters in [0, 1] by evolution, a group of them at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.files import replacing
from resting.sparsifier.progress import OnProgress, silent

Fitness = Callable[[list[float]], float]
"""From genome to a loss: smaller is fitter."""


@dataclass(frozen=True)
class Evolution:
    """Searches by elitist selection, uniform crossover and mutation.

    The operators are this project's: of R-Sparse's (arXiv 2504.19449) population and generations alone are known,
    second hand.

    Attributes
    ----------
    population, generations : int
        Members per generation, and generations per group of genes.
    mutation : float
        Probability that a gene mutates; half of the mutations draw it anew, half move it by a Gaussian of 0.05.
    seed : int
    """

    population: int = 32
    generations: int = 5
    mutation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("population", 2), ("generations", 1)):
            if getattr(self, name) < lowest:
                raise SparsifierError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if not 0.0 <= self.mutation <= 1.0:
            raise SparsifierError(f"mutation must be in [0, 1], got {self.mutation}")

    def search(
        self,
        founders: Sequence[list[float]],
        groups: Sequence[Sequence[int]],
        fitness: Fitness,
        file: Path | None = None,
        on_progress: OnProgress = silent,
    ) -> tuple[list[float], list[float]]:
        """Searches for the genome of the least loss.

        Parameters
        ----------
        founders : sequence of genomes
            The first is the starting point; in each group's first generation all of them take part.
        groups : sequence of gene indices
            Genes that vary together, while all others stay at the best so far.
        fitness : callable
        file : Path, optional
            State after every generation, so that a killed search continues as if it had not been.
        on_progress : OnProgress, optional
            Is told of the generations done and in all; its note is the best loss.

        Returns
        -------
        genome, losses
            `losses` has the best loss after every generation; it never rises.
        """
        state = self._state(file, founders, fitness)
        while state["group"] < len(groups):
            genes = list(groups[state["group"]])
            random = np.random.default_rng([self.seed, state["group"], state["generation"]])
            if state["generation"] == 0:
                members = [state["best"]] + [_with(state["best"], genes, f) for f in founders]
                members += [
                    self._mutated(state["best"], genes, random, 1.0)
                    for _ in range(self.population - len(dict.fromkeys(map(tuple, members))))
                ]
                state["elite"] = []
            else:
                parents = [genome for genome, _ in state["elite"]]
                members = [self._child(parents, genes, random) for _ in range(self.population - len(parents))]
            known = {tuple(genome): loss for genome, loss in [*state["elite"], (state["best"], state["loss"])]}
            for genome in members:
                if tuple(genome) not in known:
                    known[tuple(genome)] = _comparable(fitness(genome))
            ranked = sorted(known.items(), key=lambda item: item[1])
            state["elite"] = [(list(genome), loss) for genome, loss in ranked[: max(1, self.population // 4)]]
            state["best"], state["loss"] = state["elite"][0]
            state["losses"].append(state["loss"])
            state["generation"] += 1
            if state["generation"] == self.generations:
                state["group"], state["generation"] = state["group"] + 1, 0
            _save(file, state)
            total, note = len(groups) * self.generations, f"loss {state['loss']:.4f}"
            on_progress("evolution", len(state["losses"]), total, note)
        return state["best"], state["losses"]

    def _state(self, file: Path | None, founders: Sequence[list[float]], fitness: Fitness) -> dict[str, Any]:
        if file is not None and file.exists():
            with contextlib.suppress(ValueError, AttributeError):  # a damaged file: searched again
                state = json.loads(file.read_text())
                if state.keys() == {"group", "generation", "best", "loss", "elite", "losses"}:
                    return state
        first = list(founders[0])
        loss = _comparable(fitness(first))
        return {"group": 0, "generation": 0, "best": first, "loss": loss, "elite": [], "losses": []}

    def _child(self, parents: list[list[float]], genes: list[int], random: np.random.Generator) -> list[float]:
        first, second = (parents[int(i)] for i in random.integers(len(parents), size=2))
        crossed = list(first)
        for gene in genes:
            if random.random() < 0.5:
                crossed[gene] = second[gene]
        return self._mutated(crossed, genes, random, self.mutation)

    def _mutated(
        self, genome: list[float], genes: list[int], random: np.random.Generator, probability: float
    ) -> list[float]:
        out = list(genome)
        for gene in genes:
            if random.random() < probability:
                moved = random.random() if random.random() < 0.5 else out[gene] + 0.05 * random.standard_normal()
                out[gene] = float(min(1.0, max(0.0, moved)))
        return out


def _comparable(loss: float) -> float:
    """Gives `loss`, or the worst of all where it is not a number."""
    return math.inf if math.isnan(loss) else loss


def _with(genome: list[float], genes: list[int], other: list[float]) -> list[float]:
    """Puts the genes of `other` at `genes` into `genome`."""
    return [other[i] if i in genes else value for i, value in enumerate(genome)]


def _save(file: Path | None, state: dict[str, Any]) -> None:
    if file is None:
        return
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(state))
