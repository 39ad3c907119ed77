"""Defines the schema of a suite, which is checked to the last key before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from resting.benchmarks.assets import texts
from resting.benchmarks.assets.texts import Own
from resting.benchmarks.cells import literature, text_names
from resting.sparsifier import AllButFirst, DecodeOnly, LastFraction, TokenPolicy
from resting.sparsifier.quantised.formats import AS_IS, Format

Target = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch takes
Threads = Annotated[int, Field(ge=1, le=1024)]
Bos = Literal["auto", "always", "never"]


def _once(values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands there twice")
    return values


class Section(BaseModel):
    """Refuses keys that it does not know, and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Tokens(Section):
    """Says which tokens are sparse."""

    policy: Literal["all-but-first", "last-fraction", "decode-only"] = "all-but-first"
    n: int = Field(1, ge=0)
    fraction: float = Field(0.5, ge=0.0, le=1.0)
    prompt: int | None = Field(None, ge=0)
    """Of decode-only: the first tokens of a window are the prompt, what follows is as if decoded."""

    def build(self) -> TokenPolicy:
        if self.policy == "all-but-first":
            return AllButFirst(self.n)
        return LastFraction(self.fraction) if self.policy == "last-fraction" else DecodeOnly(self.prompt)


class PolicyConfig(Tokens):
    """Names a further token policy, under which the suite's methods are measured at `targets`."""

    targets: list[Target] = Field(min_length=1)
    methods: list[str] | None = Field(None, min_length=1)
    """Their names; all of the suite's where None."""

    @field_validator("targets", "methods")
    @classmethod
    def _each_once(cls, values: list[Any] | None) -> list[Any] | None:
        return values and _once(values)


class CalibrationConfig(Section):
    """Says which text methods are fitted on, and how.

    `matching_windows` windows of `matching_window` tokens, from the calibration documents of every one of
    `matching_texts`, are what a method meets its byte target on.
    """

    text: str = "wikipedia"
    window: int = Field(512, ge=8)
    windows: int | None = Field(None, ge=1)
    statistics_windows: int = Field(16, ge=1)
    matching_texts: list[str] = Field(["wikipedia", "papers"], min_length=1)
    matching_window: int = Field(256, ge=8)
    matching_windows: int = Field(16, ge=1)

    @field_validator("matching_texts")
    @classmethod
    def _each_once(cls, values: list[str]) -> list[str]:
        return _once(values)


class EvaluationConfig(Section):
    """Says which texts perplexity and KL are measured on, and how."""

    texts: list[str] = ["wikitext2", "wikipedia", "papers"]
    window: int = Field(512, ge=8)
    windows: int | None = Field(None, ge=1)
    batch_size: int = Field(4, ge=1)
    scored: int | None = Field(None, ge=1)
    """Score only the last so many tokens of a window; the ones before are context."""
    stride: int | None = Field(None, ge=1)
    """Begin a window every so many tokens: windows overlap, and only the text's start has a BOS token, as in TEAL."""
    folded: list[Target] = []
    """Targets at which plans with biases are also measured as exported, with the bias on every token, on one text."""
    on_dense: list[Target] = []
    """Targets at which the biases of plans are also measured on the dense model, on every text: a control."""

    @field_validator("texts")
    @classmethod
    def _each_once(cls, values: list[str]) -> list[str]:
        return _once(values)


class TasksConfig(Section):
    """Names tasks of lm-eval's that accuracy is measured on, zero-shot (MMLU with five examples)."""

    names: list[str] = Field(min_length=1)
    items: int | None = Field(200, ge=3)
    """Documents a task, a seeded sample with the shares of the right answers; all where None (``0`` in TOML)."""
    seed: Seed = 0
    compare: Literal["float32", "bfloat16"] | None = None
    """A dtype that the dense model is asked in as well."""

    @field_validator("items", mode="before")
    @classmethod
    def _all(cls, items: Any) -> Any:
        return None if items == 0 else items

    @field_validator("names")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        return _once(names)


class LatencyDeviceConfig(Section):
    """Says what is timed on one kind of device."""

    dtypes: list[Literal["float32", "bfloat16", "float16"]] = Field(["float32"], min_length=1)
    threads: list[Threads] = Field([1], min_length=1)  # of the kernels and of torch, on a CPU
    matrices: list[str] = []
    """``INPUTSxOUTPUTS``, each through the kernels alone."""
    sparsities: list[Target] = Field([0.25, 0.40, 0.50, 0.60, 0.70, 0.90], min_length=1)  # of matrices
    models: list[str] = []
    """``smollm2-135m``, or a published shape with random weights, such as ``llama-3.2-1b``."""
    dense_paths: list[str] = []
    """Dense paths that are tried, all of the device's where none is named; the fastest of them is compared with."""

    @field_validator("dtypes", "threads", "matrices", "sparsities", "models", "dense_paths")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        return _once(values)

    @field_validator("matrices")
    @classmethod
    def _shapes(cls, matrices: list[str]) -> list[str]:
        for text in matrices:
            if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text):
                raise ValueError(f"matrix {text!r}: must be INPUTSxOUTPUTS, such as 4096x14336")
        return matrices


class LatencyConfig(Section):
    """Says what is timed, in a suite that measures time instead of quality."""

    prompt: int = Field(64, ge=2)
    decoded_tokens: int = Field(48, ge=8)  # after the prompt, each timed
    generate: bool = True  # whether `model.generate` is timed as well
    quality: str | None = None
    """Suite whose results say how good the same plans are: for the picture of quality against time."""
    cpu: LatencyDeviceConfig | None = None
    cuda: LatencyDeviceConfig | None = None


class MethodConfig(Section):
    """Names one method of the suite, with its settings.

    `name` is an expression such as ``spon(teal)``; `label` is what rows call it; `targets`, `seeds` and `text` (what it
    is calibrated on) replace the suite's; `parameters` go to the outermost method, `inner` to the one it wraps.
    """

    name: str
    label: str | None = Field(None, pattern=r"^[^\x00-\x1f]+$")
    targets: list[Target] | None = Field(None, min_length=1)
    seeds: list[Seed] | None = Field(None, min_length=1)
    text: str | None = None
    parameters: dict[str, Any] = {}
    inner: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _normal(cls, name: str) -> str:
        return "".join(name.split())

    @field_validator("targets", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any] | None) -> list[Any] | None:
        return values and _once(values)

    @field_validator("parameters")
    @classmethod
    def _no_seed(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        if "seed" in parameters:
            raise ValueError("a seed is given with `seeds`")
        return parameters

    @property
    def shown(self) -> str:
        settings = ", ".join(f"{key} = {value}" for key, value in (self.inner | self.parameters).items())
        return self.label or self.name + (f" ({settings})" if settings else "")


class Source(Section):
    """Says where the documents of a text of the user's own lie, and what they are."""

    where: str = Field(min_length=1)
    """``mine.txt``, ``data.jsonl:field``, or ``hub:organisation/name:config:split:field``; a run adds the commit."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Of the documents, whatever file they are in; other ones are refused where it is given."""
    documents: int | None = Field(None, ge=1)
    _folder: Path | None = PrivateAttr(None)

    def lie_in(self, folder: Path) -> None:
        """Make a path that is not absolute one in `folder`, if nothing has said so before."""
        self._folder = self._folder or folder

    @property
    def folder(self) -> Path | None:
        """Folder that a path is relative to; the present one where None."""
        return self._folder


class Published(Section):
    """Quotes a figure from the literature, which is listed beside the measured one."""

    model: str
    method: str
    target: Target
    metric: str
    value: float
    tag: Literal["C", "A", "S", "D"]
    """C read in released code or artefacts; A in the abstract or README; S second hand; D derived from shapes."""
    source: str


class Suite(Section):
    """Holds a validated suite file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    description: str = ""
    model: str | list[str] = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    bos: Bos = "auto"
    """Begin windows, of calibration too, and prompts as the tokenizer does; always with its BOS token; or never."""
    targets: list[Target] = Field(min_length=1)
    seeds: list[Seed] = Field([0], min_length=1)
    weights: list[str] = Field([AS_IS], min_length=1)
    """Formats that block linears are stored in, such as ``int4-g128``: every method is measured on each of them."""
    tokens: Tokens = Field(default_factory=Tokens)
    policies: list[PolicyConfig] = []
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tasks: TasksConfig | None = None
    latency: LatencyConfig | None = None
    methods: list[MethodConfig] = Field(min_length=1)
    reference: str | None = None
    """The method whose loss the report shows the shares of, and that rankings hold others against."""
    ranking: bool = False
    """Whether the report ranks the methods, target by target."""
    published: list[Published] = []
    literature: list[str] = []
    """Tables of ``assets/published.toml`` that the report puts beside what was measured."""
    sources: dict[str, Source] = {}
    """Texts of the user's own by name. Where a text is named, ``mine.txt`` or ``NAME=FILE`` may stand as well."""
    changed: dict[str, Any] = {}
    """What the command line put in place of the file's own choices, and the suite that it was (`choices.changed`)."""

    @property
    def models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else self.model

    @property
    def task_names(self) -> list[str]:
        return self.tasks.names if self.tasks else []

    @property
    def calibration_texts(self) -> list[str]:
        """Names of all texts that something is fitted on."""
        own = [method.text for method in self.methods if method.text]
        return list(dict.fromkeys([self.calibration.text, *self.calibration.matching_texts, *own]))

    def own(self, text: str) -> Own | None:
        """Find the documents of a text of the user's own; None for a known one.

        A text that is both fitted and measured on is divided: each document is on one side.
        """
        if text not in self.sources:
            return None
        return Own(self.sources[text].sha256 or "", text in self.evaluation.texts and text in self.calibration_texts)

    def beside(self, folder: Path) -> Self:
        """Return the suite with the paths of its own texts relative to `folder`."""
        for source in self.sources.values():
            source.lie_in(folder)
        return self

    @model_validator(mode="before")
    @classmethod
    def _own_texts_are_named(cls, values: Any) -> Any:
        return text_names.with_names(values)

    @model_validator(mode="after")
    def _texts_are_known(self) -> Self:
        text_names.check_names(self.sources, self.task_names)
        text_names.check_known("evaluation.texts", self.evaluation.texts, "evaluation", self.sources)
        text_names.check_known("calibration.text", [self.calibration.text], "calibration", self.sources)
        embedded = self.calibration.matching_texts
        text_names.check_known("calibration.matching_texts", embedded, "calibration", self.sources, texts.SPLITS)
        for number, method in enumerate(self.methods):
            named = [method.text] if method.text else []
            text_names.check_known(f"methods.{number}.text", named, "calibration", self.sources)
        return self

    @field_validator("model")
    @classmethod
    def _some_model(cls, model: str | list[str]) -> str | list[str]:
        if not model or not all(model):
            raise ValueError(f"{model!r} names no model; allowed: one, or a list of some")
        return model if isinstance(model, str) else _once(model)

    @field_validator("methods")
    @classmethod
    def _one_row_each(cls, methods: list[MethodConfig]) -> list[MethodConfig]:
        shown = [m.shown for m in methods]
        for label in shown:
            if shown.count(label) > 1:
                raise ValueError(f"two methods are called {label!r}: give one a label")
        return methods

    @field_validator("targets", "seeds")
    @classmethod
    def _each_once(cls, values: list[float]) -> list[float]:
        return _once(values)

    @field_validator("weights")
    @classmethod
    def _known_formats(cls, names: list[str]) -> list[str]:
        return _once([name for name in names if Format.parse(name) or name == AS_IS])

    @field_validator("literature")
    @classmethod
    def _known_tables(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in (known := literature.tables()):
                raise ValueError(f"there is no table {name!r} of published figures; allowed: {', '.join(known)}")
        return _once(names)

    @model_validator(mode="after")
    def _some_token_is_sparse(self) -> Self:
        length = self.evaluation.window
        for table in (self.tokens, *self.policies):
            policy = table.build()
            if policy.dense_tokens(length, 0) >= length - 1:
                hint = "; decode-only takes a `prompt` here" if table.policy == "decode-only" else ""
                raise ValueError(
                    f"tokens: policy {policy} leaves every token of a window of {length} dense; allowed are policies "
                    f"under which some token that predicts another is sparse{hint}"
                )
        return self

    @model_validator(mode="after")
    def _something_is_measured(self) -> Self:
        if self.latency is not None and (self.evaluation.texts or self.tasks):
            raise ValueError("latency: a suite measures either time or quality; evaluation.texts = [], and no [tasks]")
        tables = [self.latency.cpu, self.latency.cuda] if self.latency else []
        if self.latency is not None and not any(t.matrices or t.models for t in tables if t is not None):
            raise ValueError(
                "latency: nothing is timed; allowed with matrices or models in [latency.cpu] or [latency.cuda]"
            )
        if not self.evaluation.texts and self.tasks is None and self.latency is None:
            raise ValueError("evaluation.texts = []: nothing is measured; allowed with a table [tasks] or [latency]")
        return self

    @model_validator(mode="after")
    def _policies_are_others(self) -> Self:
        names = [str(table.build()) for table in (self.tokens, *self.policies)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"policies: {name} stands there twice (the suite's own `tokens` counts)")
        if self.reference is not None and self.reference not in (shown := [m.shown for m in self.methods]):
            raise ValueError(f"reference: no method {self.reference!r} in the suite; allowed: {', '.join(shown)}")
        known = [method.name for method in self.methods]
        for table in self.policies:
            for method in table.methods or []:
                if method not in known:
                    raise ValueError(f"policies: no method {method!r} in the suite; allowed: {', '.join(known)}")
        if self.evaluation.scored is not None and self.evaluation.scored >= self.evaluation.window:
            raise ValueError(
                f"evaluation.scored = {self.evaluation.scored}: must be less than the window, {self.evaluation.window}"
            )
        scored, stride, window = self.evaluation.scored, self.evaluation.stride, self.evaluation.window
        if stride is not None and (scored is None or not scored <= stride <= window):
            raise ValueError(
                f"evaluation.stride = {stride}: would score tokens twice, or leave some out of all windows; allowed "
                f"from evaluation.scored, which it needs, to the window, {window}"
            )
        return self
