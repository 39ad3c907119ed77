"""Holds what a fitted sparsifier decided, site by site."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from resting.sparsifier import fingerprint
from resting.sparsifier.errors import PlanError
from resting.sparsifier.layers import SparseLinear, StandIn, installed
from resting.sparsifier.meter import Meter
from resting.sparsifier.policy import AllButFirst, TokenPolicy
from resting.sparsifier.repeating import repeatable
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import ACT, Decoder, Site
from resting.sparsifier.token_tracker import TokenTracker

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Holds rules by site, and says what they were fitted on.

    Attributes
    ----------
    rules : dict of Site to Rule
        Sites without a rule stay dense.
    method : str
        The method's name as in results, for instance ``"spon(teal)"``.
    target : float
        Model-wide byte sparsity asked for.
    nominal : float
        Byte sparsity that the statistics of the dense model promise; the measured one meets `target`.
    model : str
        Fingerprint of the weights it belongs to (`fingerprint.of_model`).
    calibration : str
        Digest of the calibration text.
    info : dict
        What else the method has to say (JSON), for instance its training curve.
    """

    rules: dict[Site, Rule]
    method: str
    target: float
    nominal: float
    model: str
    calibration: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(
        self, model: nn.Module, tokens: TokenPolicy = AllButFirst(1), meter: Meter | None = None
    ) -> Iterator[dict[Site, SparseLinear]]:
        """Makes `model` sparse inside the ``with`` block; it comes back bit for bit, also after an exception.

        Parameters
        ----------
        model : nn.Module
            The model the plan was fitted on, in any floating dtype and on any device.
        tokens : TokenPolicy
            Which tokens are sparse.
        meter : Meter, optional
            Measures byte sparsity on what runs inside.

        Yields
        ------
        dict of Site to SparseLinear
            The layers that stand in.

        Raises
        ------
        PlanError
            If the plan belongs to another model, does not fit it, or a plan is applied to it already.
        """
        self.check(model)
        decoder = Decoder.of(model)
        if meter is not None:
            meter.open(decoder, self.rules)
        tracker = TokenTracker(tokens)
        with ExitStack() as stack:
            stack.callback(tracker.watch(decoder.trunk).remove)
            stack.enter_context(repeatable(decoder.trunk, tracker))
            if meter is not None:
                stack.callback(_count_tokens(decoder, tracker, meter).remove)
            layers = stack.enter_context(installed(decoder, self.rules, tracker, meter))
            yield {site: layer for site, layer in layers.items() if isinstance(layer, SparseLinear)}

    def check(self, model: nn.Module) -> None:
        """Refuses a model that is not the one the plan was fitted on, or that a plan is applied to already.

        Raises
        ------
        PlanError
        """
        if any(isinstance(m, StandIn) for m in model.modules()):
            raise PlanError("a plan is applied to this model already: leave its `with` block first")
        actual = fingerprint.of_model(model)
        if self.model != actual:
            raise PlanError(f"this plan was fitted on model {self.model[:16]}, not on {actual[:16]}")
        self._check_shapes(Decoder.of(model))

    def _check_shapes(self, decoder: Decoder) -> None:
        for site, rule in self.rules.items():
            if site not in decoder.slots:
                raise PlanError(f"the plan has a rule at {site}, where this model has no site")
            linear = decoder.linear(Site(site.block, "down") if site.role == ACT else site)
            wanted = {
                "threshold": linear.in_features,
                "scale": linear.in_features,
                "shift": linear.in_features,
            }
            for name, width in (wanted | {"bias": linear.out_features}).items():
                value = getattr(rule, name)
                if isinstance(value, torch.Tensor) and value.dim() and len(value) != width:
                    raise PlanError(f"{name} at {site} has {len(value)} entries, the model needs {width}")
            if site.role == ACT and rule.extra_elements():
                raise PlanError(f"a rule at {site} masks an activation: it takes no bias and no low_rank")
            if rule.low_rank is not None:
                shape = [rule.low_rank[0].shape[0], rule.low_rank[1].shape[1]]
                if shape != list(linear.weight.shape):
                    raise PlanError(f"low_rank at {site} is {shape}, the model needs {list(linear.weight.shape)}")

    @contextmanager
    def folded(self, model: nn.Module) -> Iterator[Plan]:
        """Writes the biases into the linear layers of `model` for the length of the ``with`` block.

        The exported form: a bias then acts on every token, dense ones too (they differ from `applied` by that).

        Yields
        ------
        Plan
            The same masks without biases, to be applied to the folded model.

        Raises
        ------
        PlanError
            If a rule shifts its input: a dense token would get the shift back that was never taken from it.
        """
        for site, rule in self.rules.items():
            if torch.as_tensor(rule.shift).any():
                raise PlanError(f"{self.method} shifts the input at {site}: such a plan cannot be folded")
        decoder = Decoder.of(model)
        with ExitStack() as stack:
            for site, rule in self.rules.items():
                if rule.bias is not None:
                    linear = decoder.linear(site)
                    bias = rule.bias.to(linear.weight)
                    stack.callback(setattr, linear, "bias", linear.bias)
                    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias, requires_grad=False)
            rules = {site: replace(rule, bias=None) for site, rule in self.rules.items()}
            yield replace(self, rules=rules, model=fingerprint.of_model(model))

    def biases_only(self) -> Plan:
        """Gives the plan without its masks: what its biases do to a model that is not sparse.

        A shift stays, since its part of the bias only gives back what it takes.
        """
        carried = {site: rule for site, rule in self.rules.items() if rule.bias is not None}
        rules = {site: Rule(bias=rule.bias, shift=rule.shift) for site, rule in carried.items()}
        return replace(self, rules=rules)

    def save(self, folder: Path | str) -> None:
        """Writes ``plan.json`` and ``rules.safetensors`` into `folder`, all or nothing."""
        folder = Path(folder)
        if folder.exists() and not (folder / "plan.json").exists():
            raise PlanError(f"{folder} exists and is no plan: it is not overwritten")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        tensors = {f"{site}/{k}": t for site, rule in self.rules.items() for k, t in rule.tensors().items()}
        save_file({k: t.clone() for k, t in tensors.items()}, temporary / "rules.safetensors")
        meta = {name: getattr(self, name) for name in ("method", "target", "nominal", "model", "calibration", "info")}
        meta |= {"format": FORMAT, "sites": [str(site) for site in self.rules]}
        (temporary / "plan.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)

    @classmethod
    def load(cls, folder: Path | str) -> Plan:
        """Reads a plan; it can be applied only to the model it was fitted on.

        Raises
        ------
        PlanError
            If files are missing, damaged or of a newer format.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "plan.json").read_text())
            if (found := meta.pop("format")) != FORMAT:
                raise PlanError(f"its format is newer than {FORMAT}, or none ({found!r}): update resting-neurons")
            by_site: dict[str, dict[str, torch.Tensor]] = {name: {} for name in meta.pop("sites")}
            for key, tensor in load_file(folder / "rules.safetensors").items():
                if not bool(torch.isfinite(tensor).all()):
                    raise PlanError(f"{key} is NaN or infinite; allowed: finite numbers")
                site, name = key.split("/")
                by_site[site][name] = tensor
            return cls(rules={Site.parse(s): Rule.from_tensors(t) for s, t in by_site.items()}, **meta)
        except KeyError as error:
            raise PlanError(f"no readable plan in {folder}: it lacks {error}") from error
        except Exception as error:
            raise PlanError(f"no readable plan in {folder}: {error}") from error


def _count_tokens(decoder: Decoder, tracker: TokenTracker, meter: Meter) -> torch.utils.hooks.RemovableHandle:
    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        selection = tracker.selection
        if selection.counted:
            meter.count_tokens(selection.tokens)

    return decoder.slots[Site(0, "gate")].parent.register_forward_pre_hook(count)
