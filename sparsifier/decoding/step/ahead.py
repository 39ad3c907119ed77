"""Begins the next token on a GPU before it is asked for, with the most likely one, while that is the one that comes.

What a caller does between two tokens (sampling, stopping criteria, streaming) then takes no time of the GPU's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HITS = 2
"""Tokens in a row that must be the most likely ones before the next is begun ahead."""
REST = 16
"""Tokens after a miss for which nothing is guessed."""


class Ahead:
    """Looks one token ahead, on a stream of its own.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._guess = torch.zeros(1, 1, dtype=torch.long, pin_memory=True)
        self._guessed, self._free, self._done = (torch.cuda.Event() for _ in range(3))
        self._place: int | None = None
        self._is_running = False
        self._score = 0

    def has(self, token: Tensor, past: int) -> bool:
        """Tells whether `token` [1, 1] at place `past` was begun; whatever was begun is waited for, by the GPU."""
        place, running = self._place, self._is_running
        self.wait()
        if place is None:
            return False
        self._guessed.synchronize()
        if place != past or int(token) != int(self._guess):
            self._score = -REST
            return False
        self._score += 1
        return running

    def begin(self, logits: Tensor, place: int, run: Callable[[Tensor], object] | None) -> None:
        """Guesses what follows `logits` [1, 1, vocabulary], and begins it where guesses were right.

        Parameters
        ----------
        logits : Tensor
            Of the token before; `run` may overwrite what they were copied from.
        place : int
            Of the token that is guessed.
        run : callable, optional
            Computes a step with a token [1, 1]; None where there is no place for one.
        """
        if self._score < 0:
            self._score += 1
            return
        self._free.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._free)
        with torch.cuda.stream(self._stream):
            guess = logits.argmax(-1)
            logits.record_stream(self._stream)
            self._guess.copy_(guess, non_blocking=True)
            self._guessed.record(self._stream)
            self._is_running = run is not None and self._score >= HITS
            if self._is_running and run is not None:
                run(guess)
            self._done.record(self._stream)
        self._place = place

    def wait(self) -> None:
        """Makes the current stream wait for what was begun, which is forgotten."""
        if self._place is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        self._place, self._is_running = None, False
