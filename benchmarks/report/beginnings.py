"""Says how the windows of a suite are cut, which tokens they begin with, and what a token reads of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sentences(facts: dict[str, Any], counts: Mapping[str, int] | None = None) -> str:
    """Describe windows and beginnings after what provenance.json holds; nothing of what older results do not say.

    Parameters
    ----------
    facts : dict
    counts : mapping of str to int, optional
        How many windows of a text were measured, which are fewer than asked for where the text is short.
    """
    evaluation = facts["suite"]["evaluation"]
    said = []
    if evaluation["texts"]:
        count = "all" if evaluation["windows"] is None else f"a seeded sample of {evaluation['windows']}"
        cut = "without overlap"
        if stride := evaluation.get("stride"):
            cut = f"that begin every {stride} tokens, of which the last {evaluation['scored']} are scored"
        asked = evaluation["windows"] or 0
        few = [f"{n} of {text}" for text, n in (counts or {}).items() if 0 < n < asked]
        fewer = f" Shorter texts have fewer: {' and '.join(few)}." if few else ""
        said.append(f"Windows of {evaluation['window']} tokens {cut}, {count} a text.{fewer}")
    windows = "texts" if evaluation.get("stride") else "windows"  # whose overlap begins anywhere
    what = {windows: evaluation["texts"], "prompts": facts["suite"].get("tasks")}
    subject = " and ".join(name for name, there in what.items() if there).capitalize()
    found = _by_model(facts)
    for tokens in dict.fromkeys(found.values()):
        models = [model for model, its in found.items() if its == tokens]
        of = f" of {', '.join(models)}" if len(set(found.values())) > 1 else ""
        begin = f"begin with {' '.join(f'`{token}`' for token in tokens)}" if tokens else "begin without a BOS token"
        said.append(f"{subject}{of} {begin}.")
    said += _reads(facts)
    return "".join(f"{sentence} " for sentence in said)


def _reads(facts: dict[str, Any]) -> list[str]:
    """What a token reads of models that have experts, or matrices that no method masks."""
    found = {cell["model"]: cell["reads"] for cell in facts["cells"] if cell.get("reads")}
    return [
        f"A token of {model} reads {of['elements']:,} of the {of['stored']:,} numbers in its blocks' matrices, and of "
        f"these methods can let {of['can_rest']:.2f} rest."
        for model, of in found.items()
        if of["elements"] < of["stored"] or of["can_rest"] < 0.995
    ]


def _by_model(facts: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tokens at the beginning, by model; without those of which no cell says it."""
    return {c["model"]: tuple(c["begins_with"]) for c in facts["cells"] if c.get("begins_with") is not None}
