"""Puts other numbers in the place of a module's parameters, and the parameters back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier import fingerprint
from resting.sparsifier.errors import PlanError
from resting.sparsifier.projection import Projection

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class Swapped:
    """Exchanges parameters of a model for as long as `stack` is open.

    The parameters themselves are set aside and come back as they were; nothing is written into them. The state of the
    model shows them all the while, under their names, and none can be loaded.
    """

    def __init__(self, stack: ExitStack, digest: str) -> None:
        self._stack, self._digest = stack, digest
        self._known: set[tuple[nn.Module, str]] = set()

    def matrix(self, projection: Projection, weight: Tensor) -> None:
        """Puts `weight` [out, in] in the place of a matrix."""
        self.parameter(projection.module, projection.name, weight.T if projection.transposed else weight)

    def parameter(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Puts `value`, rounded to the dtype of the parameter, in its place."""
        held = module._parameters[name]
        assert held is not None
        rounded = value.detach().to(held.device, held.dtype).contiguous()
        if not bool(torch.isfinite(rounded).all()) and bool(torch.isfinite(held).all()):
            raise PlanError(f"a rewritten {name} of {type(module).__name__} is beyond the range of {held.dtype}")
        module._parameters[name] = nn.Parameter(rounded, requires_grad=False)
        if (module, name) in self._known:  # rewritten again
            return
        self._known.add((module, name))
        self._stack.callback(module._parameters.__setitem__, name, held)

        def show(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            if f"{prefix}{name}" in state:
                state[f"{prefix}{name}"] = held.detach()

        def refuse(*args: Any) -> None:
            raise PlanError("a transform is on this model: leave its `with` block before weights are loaded")

        self._stack.callback(module.register_state_dict_post_hook(show).remove)
        self._stack.callback(module.register_load_state_dict_pre_hook(refuse).remove)

    def finish(self, model: nn.Module) -> None:
        """Says that `model` is rewritten, and the same as before by its fingerprint."""
        self._stack.enter_context(fingerprint.standing_for(model, self._digest))

    def times(self, module: nn.Module, matrix: Tensor) -> None:
        """Multiplies what `module` gives (its first tensor) with `matrix` [d, d], in its precision, fp32 at least."""
        self._stack.callback(module.register_forward_hook(_times(matrix)).remove)


def high(tensor: Tensor) -> Tensor:
    """Gives a tensor in fp32, or in fp64 where it is."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def like(matrix: Tensor, weight: Tensor) -> Tensor:
    """Gives `matrix` where `weight` is, in the precision that products with it are computed in."""
    return matrix.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def _times(matrix: Tensor) -> Hook:
    ready: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        key = (x.dtype, x.device)
        if key not in ready:  # a matrix that is rounded to bfloat16 is no rotation any more
            ready[key] = like(matrix, x)
        turned = (x.to(ready[key].dtype) @ ready[key]).to(x.dtype)
        return (turned, *output[1:]) if isinstance(output, tuple) else turned

    return hook
