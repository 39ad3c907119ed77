"""Says what a run would do: its cells, what it would download, and the memory and time it would need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resting.benchmarks.assets import models, texts
from resting.benchmarks.cells import own_texts, run_time
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.identity import cell_key, run_setting
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.cli import time_estimate
from resting.benchmarks.documents import hub
from resting.benchmarks.errors import AssetError, ModelError, first_line
from resting.benchmarks.latency.random_models import shapes_by_hub_id
from resting.benchmarks.quality import fits
from resting.benchmarks.quality.weight_formats import in_formats
from resting.sparsifier import Statistic
from resting.sparsifier.quantised.formats import AS_IS

BYTES = {"float32": 4, "bfloat16": 2}
CHUNK = 4 * 128
"""Rows of logits, in fp32, that scoring holds at a time."""


@dataclass(frozen=True)
class Estimate:
    """Holds sizes in bytes of one model under one suite; None where the model's shape is not known.

    Attributes
    ----------
    download : int
        Weights that are not on this machine yet, two bytes each.
    weights : int
        In memory, in the suite's dtype.
    extra : int
        Beside the weights: dense hidden states of all scored windows, logits, histograms.
    parameters : int
        Weights of the model.
    """

    download: int | None
    weights: int | None
    extra: int | None
    parameters: int | None = None


def parameters(config: dict[str, Any]) -> int:
    """Count the weights of a gated decoder, from its configuration (norms are left out)."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    key_value = hidden // heads * (config.get("num_key_value_heads") or heads)
    block = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * ffn
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return config["num_hidden_layers"] * block + embeddings


def shape(spec: str, suite: Suite, trusted: bool = False) -> tuple[dict[str, Any] | None, bool]:
    """Configuration of a model, and whether its weights are on this machine; nothing is downloaded but a config."""
    known = shapes_by_hub_id()
    if spec == models.DEFAULT and not models.is_cached():
        return None, False
    try:
        source = models.resolve(spec, local_files_only=True, trusted=trusted)
    except AssetError:
        if spec in known or models.is_hub_id(spec):
            return known.get(spec) or _hub_config(spec), False
        raise
    from transformers import AutoConfig

    fits.check(suite, source)
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted).to_dict(), True
    except Exception as error:
        raise ModelError(f"the model in {source.folder} cannot be loaded: {first_line(error)}") from error


def _hub_config(spec: str) -> dict[str, Any] | None:
    import json

    from huggingface_hub import hf_hub_download

    try:
        return json.loads(Path(hf_hub_download(spec, "config.json")).read_text())
    except Exception:
        return None


def estimate(spec: str, suite: Suite, cells: list[Cell], trusted: bool = False) -> Estimate:
    """Estimate sizes for the model `spec`."""
    config, is_here = shape(spec, suite, trusted)
    if config is None:
        return Estimate(None, None, None)
    try:
        count, size = parameters(config), BYTES[suite.dtype]
    except (KeyError, TypeError, ZeroDivisionError):  # no gated decoder; what it is instead, a run says
        return Estimate(None, None, None)
    hidden_states = run_time.evaluated_tokens(suite) * config["hidden_size"] * size
    logits = 3 * CHUNK * config["vocab_size"] * 4
    histograms = 2 * 16384 * 8 * 8 * config["num_hidden_layers"]
    needs = frozenset[Statistic]().union(*(cell.sparsifier.needs for cell in cells))
    extra = hidden_states + logits + histograms * bool(needs)
    return Estimate(0 if is_here else 2 * count, size * count, extra, count)


def lines(suite: Suite, names: list[str], cells: list[Cell], options: Options) -> list[str]:
    """Write the lines of a dry run."""
    trusted = options.trusted
    if options.dtype:
        suite = suite.model_copy(update={"dtype": options.dtype})
    suite = _read(suite, options)
    wanted = dict.fromkeys([*suite.evaluation.texts, *(c.config.text or suite.calibration.text for c in cells)])
    what = f"{len(names)} models, {len(cells)} cells each" if len(names) > 1 else f"one model, {len(cells)} cells"
    stored = "" if suite.weights == [AS_IS] else f", weights {', '.join(suite.weights)}"
    out = [f"suite {suite.name}: {what}{stored}; nothing is measured"]
    out += [f"text {name}: {_state(suite, name)}" for name in wanted]
    if suite.tasks:
        asked = f"{suite.tasks.items} items each" if suite.tasks.items else "all items"
        out.append(f"tasks, {asked}: {', '.join(suite.tasks.names)}")
    for name in names:
        size = estimate(name, suite, cells, trusted)
        download = "unknown" if size.download is None else f"{size.download / 1e9:.1f} GB"
        memory = "unknown" if size.weights is None else f"{size.weights / 1e9:.1f} GB"
        extra = "unknown" if size.extra is None else f"{size.extra / 1e9:.1f} GB"
        out.append(f"model {name}: weights to download {download}; memory {memory} of weights + about {extra}")
        out += _time(name, suite, cells, options)
        machines = run_time.machines() if suite.latency is None else []
        out += [f"  time on {of.name}: {_total(suite, cells, size, of)}" for of in machines]
        for cell in cells:
            text = cell.config.text or suite.calibration.text
            method = cell.sparsifier
            size_of = (
                f"{method.original.windows} x {method.original.window} tokens"
                if method.protocol == "original" and method.original
                else f"{suite.calibration.statistics_windows} x {suite.calibration.window} tokens"
            )
            fitted = "" if cell.config.name == "dense" else f", fitted on {size_of} of {text}"
            known = [
                f"{run_time.shown(seconds)} on {of.name.split(',')[0]}"
                for of in machines
                if (seconds := run_time.seconds(suite, cell, size.parameters, of)) is not None
            ]
            time = f", {' or '.join(known) or 'time unknown'}" if machines else ""
            out.append(f"  {cell.label:<28} {cell.target:.2f}  seed {cell.seed}  {cell.policy}{fitted}{time}")
    return out


def _total(suite: Suite, cells: list[Cell], size: Estimate, machine: run_time.Machine) -> str:
    """Sum up all cells on one machine."""
    times = [run_time.seconds(suite, cell, size.parameters, machine) for cell in cells]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return "unknown (no rate was measured for a model of this size and dtype)"
    total = sum(known) * len(suite.weights)
    return f"about {run_time.shown(total)}, and what methods search or decompose"


def _read(suite: Suite, options: Options) -> Suite:
    """The suite with its own texts, which tell its cells apart; as it is where one of them lies on the hub."""
    own_texts.check_names(suite, options.texts)
    on_hub = [one for one in suite.sources.values() if one.where.startswith(hub.PREFIX)]
    mine = {name: file for name, file in options.texts.items() if name in suite.sources}
    return suite if on_hub else own_texts.resolved(suite, mine, fetch=False)


def _state(suite: Suite, name: str) -> str:
    """Whether a text is on this machine."""
    source = suite.sources.get(name)
    if source is None:
        return "cached" if texts.is_cached(name) else "to be fetched"
    if source.sha256 is None:
        return f"to be read from {source.where}"
    return f"{source.documents} documents of {source.where}, sha256 {source.sha256[:12]}"


def _time(name: str, suite: Suite, cells: list[Cell], options: Options) -> list[str]:
    """About how long the cells of a model will take, a line for every weight format."""
    if suite.latency is not None:
        return ["time: unknown, a suite of times measures everything again"]
    try:
        source = models.resolve(name, local_files_only=True, trusted=options.trusted)
    except AssetError:
        return [f"time: unknown for all {len(cells) * len(suite.weights)} cells, the model is not here"]
    read = all(one.sha256 for one in suite.sources.values())
    said = []
    for one in in_formats([source], suite.weights):
        setting = run_setting(suite, one, options.device, ()) if read else None
        keyed = [(None if setting is None else cell_key(cell, setting), cell) for cell in cells]
        line = time_estimate.line(suite, keyed, one.sha256, options.device, options.output)
        said.append(line if suite.weights == [AS_IS] else f"{one.weights}: {line}")
    return said
