"""Shows lm-eval the model as its own HF class, with another way through the tokens."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from resting.benchmarks.cells.suite import Bos
from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality import limits
from resting.benchmarks.quality.bos import beginning
from resting.benchmarks.quality.tasks.likelihood import Scorer


class PackedLM(HFLM):
    """Answers as lm-eval's ``hf`` model does, with requests that share a beginning packed and tokenised once.

    What the model is when a request comes is what is scored: under an applied plan, the sparse model. lm-eval's cache
    of responses, which does not know one from the other, is not used.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizer
    scorer : Scorer
    bos : {"auto", "always", "never"}
        What prompts begin with. An empty prompt is one BOS or EOS token whatever this is.

    Raises
    ------
    AssetError
        If the tokenizer has neither BOS nor EOS, one of which lm-eval takes for the context of an empty prompt.
    SuiteError
        If the tokenizer has no BOS token, and one is asked for.
    """

    def __init__(self, model: Any, tokenizer: Any, scorer: Scorer, bos: Bos = "auto") -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise AssetError("the tokenizer has neither a BOS nor an EOS token: lm-eval needs one of them")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=scorer.context)
        self.scorer = scorer
        self._begin = None if bos == "auto" else beginning(tokenizer, bos)  # None: as lm-eval does
        self._pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = (context, continuation)
        if pair not in self._pairs:
            self._pairs[pair] = super()._encode_pair(context, continuation)
        return self._pairs[pair]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Tokenise as lm-eval does, with another beginning where one is asked for."""
        if self._begin is None or add_special_tokens is not None:
            return super().tok_encode(string, add_special_tokens, **more)
        ids = super().tok_encode(string, add_special_tokens=False, **more)
        return ids if self._begin and ids[:1] == self._begin else [*self._begin, *ids]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, override_bs
        longest = (max((*context, *continuation), default=0) for _, context, continuation in requests)
        limits.check_ids(longest, self.model, self.tokenizer, "a task's prompt")
        return self.scorer([(context, continuation) for _, context, continuation in requests])
