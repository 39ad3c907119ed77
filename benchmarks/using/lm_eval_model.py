"""Gives lm-eval a model under a plan, which it knows as ``resting``."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.quality.tasks.evaluator import LONGEST_CONTEXT
from resting.benchmarks.quality.tasks.likelihood import Scorer
from resting.benchmarks.quality.tasks.lm import PackedLM
from resting.benchmarks.quality.tasks.sharing_rows import may_share_rows
from resting.benchmarks.using.opening import open_plan
from resting.sparsifier import DecodeOnly, DivergedError, Meter, is_by_position
from resting.sparsifier.policy import parse

NAME = "resting"
ARGUMENTS = "plan, pretrained, tokens, dtype, device, max_length, trust_remote_code"
DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIONS = ("plan", "pretrained")
"""What messages call the plan and its model."""


@register_model(NAME)
class PlanLM(PackedLM):
    """Answers lm-eval's requests with a model under a plan, as the tasks of this project's suites do.

    Parameters
    ----------
    plan : str
        Folder of the plan.
    pretrained : str, optional
        The model: a folder, a ``.gguf`` file, a hub id or ``smollm2-135m``; the one that the plan names where None.
    tokens : str
        Which tokens are sparse (`resting.sparsifier.policy.parse`).
    dtype : str
        ``auto`` is that of the model's configuration.
    device : str, optional
        ``cuda`` where there is one, else ``cpu``.
    batch_size : int or str
        Of texts that are generated. Likelihoods are packed by tokens instead.
    max_batch_size : int
    max_length : int, optional
        Tokens of context; what is longer is cut from the left. At most those that the suites ask with.
    trust_remote_code : bool

    Raises
    ------
    BenchmarkError
        If an argument is unknown or has no such value, or plan and model cannot be had or do not belong together.
    """

    def __init__(
        self,
        plan: str | None = None,
        pretrained: str | None = None,
        tokens: str = "all-but-first:1",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        if others:
            raise BenchmarkError(f"--model_args {sorted(others)[0]}=: the model {NAME!r} takes {ARGUMENTS}")
        if plan is None:
            raise BenchmarkError(f"--model_args plan=FOLDER is missing: the model {NAME!r} answers under a plan")
        if dtype not in DTYPES:
            raise BenchmarkError(f"--model_args dtype={dtype}; allowed: {', '.join(DTYPES)}")
        self.tokens = parse(str(tokens))
        kind, where = None if dtype == "auto" else dtype, checked_device(device)
        opened = open_plan(Path(plan), pretrained, kind, where, trust_remote_code, options=OPTIONS)
        self.plan, self.meter = opened.plan, Meter()
        scorer = Scorer(opened.model, self._context(opened.model, max_length))
        super().__init__(opened.model, opened.tokenizer, scorer)
        scorer.may_pack = is_by_position(self.tokens) and may_share_rows(opened.model)
        self.batch_size_per_gpu = batch_size if str(batch_size).startswith("auto") else int(batch_size)
        self.max_batch_size = max_batch_size or 64
        self.source = opened.source

    @staticmethod
    def _context(model: Any, asked: int | None) -> int:
        has = getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST_CONTEXT)
        if asked is not None and not 0 < asked <= has:
            raise BenchmarkError(f"--model_args max_length={asked}; allowed: 1 to {has}")
        return min(LONGEST_CONTEXT, has) if asked is None else asked

    @contextmanager
    def _sparse(self) -> Iterator[None]:
        with self.plan.applied(self.model, self.tokens, self.meter):
            yield

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if isinstance(self.tokens, DecodeOnly) and self.tokens.prompt is None:
            raise BenchmarkError(
                f"tokens={self.tokens} leaves every token of a prompt dense, and this task asks for likelihoods of "
                "prompts; allowed: all-but-first[:N], last-fraction[:SHARE], decode-only:PROMPT"
            )
        with self._sparse():
            answers = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if any(math.isnan(nats) for nats, _ in answers):  # the largest of them would be taken for an answer
            raise DivergedError("log-likelihoods are not finite")
        return answers

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with self._sparse():
            found: torch.Tensor = super()._model_generate(*arguments, **options)
        return found

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse lm-eval's cache of responses, which does not know one plan from another."""
        raise BenchmarkError(f"--use_cache: lm-eval's cache knows no plan; allowed with --model {NAME}: without it")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results: the plan, the weights, and the measured byte sparsity."""
        measured = self.meter.byte_sparsity() if self.meter.tokens else None
        if measured is not None:
            logging.getLogger("lm_eval").info("%.3f of the weight bytes were left unread", measured)
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_sha": self.source.sha256,
            "plan_method": self.plan.method,
            "plan_target": self.plan.target,
            "plan_tokens": str(self.tokens),
            "plan_byte_sparsity": measured,
        }


def checked_device(device: str | None) -> str:
    """Return the device to use: the first GPU where none is named, or the CPU without one.

    Raises
    ------
    BenchmarkError
        If there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return "cuda:0" if count else "cpu"
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device not in known:
        raise BenchmarkError(f"device {device!r}; allowed: {', '.join(known)}")
    return device
