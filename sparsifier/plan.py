"""Holds what a fitted sparsifier decided, site by site."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resting.sparsifier import card, fingerprint, hub, stored
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import PlanError
from resting.sparsifier.export import storable, with_biases
from resting.sparsifier.installing import installed
from resting.sparsifier.layers import SparseProduct, StandIn
from resting.sparsifier.meter import Meter
from resting.sparsifier.neurons import NeuronMask
from resting.sparsifier.neurons.down import check_masks
from resting.sparsifier.neurons.sequence import check_prompt
from resting.sparsifier.plain import more_than_fields
from resting.sparsifier.policy import AllButFirst, TokenPolicy
from resting.sparsifier.repeating import repeatable
from resting.sparsifier.rule import Rule
from resting.sparsifier.rule_shapes import check_rules
from resting.sparsifier.same_modules import modules_of
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker
from resting.sparsifier.transform import Transform, active, dense_bias, explicit
from resting.sparsifier.weights import check_weights


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
    neurons : dict of Site to NeuronMask
        Neuron masks of gated MLPs, at sites with the role `NEURONS`.
    transform : Transform, optional
        How the model is rewritten before the rules act on it. The plan belongs to the model as it was.
    """

    rules: dict[Site, Rule]
    method: str
    target: float
    nominal: float
    model: str
    calibration: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    neurons: dict[Site, NeuronMask] = field(default_factory=dict, kw_only=True)
    transform: Transform | None = field(default=None, kw_only=True)

    @contextmanager
    def applied(
        self, model: nn.Module, tokens: TokenPolicy = AllButFirst(1), meter: Meter | None = None
    ) -> Iterator[dict[Site, SparseProduct]]:
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
        dict of Site to SparseProduct
            What stands in for the matrices: `SparseLinear`, or an expert's product.

        Raises
        ------
        PlanError
            If the plan belongs to another model, does not fit it, or a plan is applied to it already.
        SparsifierError
            If a neuron mask is made from a prompt, and `tokens` leaves none dense.
        UnsupportedModelError
            If the model cannot take the plan's transform.
        """
        if self.needs_prompt:
            check_prompt(tokens, self.method)
        decoder = self.check(model)
        if meter is not None:
            adapters = 0.0 if self.transform is None else self.transform.extra_elements
            meter.open(decoder, self.rules, self.neurons, adapters)
        tracker = TokenTracker(tokens)
        with ExitStack() as stack:
            if self.transform is not None and active(model) is None:
                stack.enter_context(explicit(self.transform, model, decoder))
            stack.callback(tracker.watch(decoder.trunk).remove)
            stack.enter_context(repeatable(decoder.trunk, tracker))
            layers = stack.enter_context(installed(decoder, self.rules, tracker, meter, self.neurons))
            yield {site: layer for site, layer in layers.items() if isinstance(layer, SparseProduct)}

    def check(self, model: nn.Module) -> Decoder:
        """Refuses a model that is not the one the plan was fitted on, that a plan is applied to, or that is quantised.

        Returns
        -------
        Decoder
            Of the model.

        Raises
        ------
        PlanError
        UnsupportedModelError
            As `check_weights`.
        """
        if any(issubclass(kind, StandIn) for kind in set(map(type, modules_of(model)))):
            raise PlanError("a plan is applied to this model already: leave its `with` block first")
        if not fingerprint.is_of(model, self.model):
            actual = fingerprint.of_model(model)
            raise PlanError(f"this plan was fitted on model {self.model[:16]}, not on {actual[:16]}")
        if (rewritten := active(model)) is not None and rewritten is not self.transform:
            raise PlanError(f"the transform {rewritten.name} is on this model: leave its `with` block first")
        decoder = Decoder.of(model)
        check_weights(decoder)
        if self.transform is not None:
            self.transform.check(decoder)
        check_rules(self.rules, decoder)
        check_masks(self.neurons, self.rules, decoder)
        return decoder

    @property
    def is_dense(self) -> bool:
        """Tells whether it leaves the model as it is."""
        return not self.rules and not self.neurons

    @property
    def needs_prompt(self) -> bool:
        """Tells whether a neuron mask is made from the prompt of a sequence: such sequences are not packed."""
        return any(mask.known.asks_for_prompt for mask in self.neurons.values())

    @property
    def is_plain(self) -> bool:
        """Tells whether the fields of `Plan`, `Rule` and `NeuronMask` are all that it is: files hold no more."""
        return not self._others()

    def check_plain(self, done: str) -> None:
        """Refuses to be `done` ("saved", "decoded") where it is not plain.

        What a subclass adds, a mask of its own say, would be lost without a word.

        Raises
        ------
        PlanError
            If the plan or a rule is of a subclass, or holds an attribute that is no field.
        """
        if others := self._others():
            raise PlanError(f"{others[0]} cannot be {done}: only the fields of Plan and Rule can")

    def _others(self) -> list[str]:
        """Lists what is more than the fields of `Plan`, `Rule`, `NeuronMask` and `Transform`."""
        found = more_than_fields("a plan", self, Plan)
        if self.transform is not None:
            found += more_than_fields("a transform", self.transform, Transform)
        for site, rule in self.rules.items():
            found += more_than_fields("a rule", rule, Rule, f"at {site}")
        for site, mask in self.neurons.items():
            found += more_than_fields("a neuron mask", mask, NeuronMask, f"at {site}")
        return found

    @contextmanager
    def folded(self, model: nn.Module) -> Iterator[Plan]:
        """Writes the biases into the linear layers of `model` for the length of the ``with`` block.

        The exported form: a bias then acts on every token, dense ones too (they differ from `applied` by that). To
        store it, see `export`: transformers would drop biases that the model's config does not have.

        Yields
        ------
        Plan
            The same masks without biases, to be applied to the folded model.

        Raises
        ------
        PlanError
            If a rule shifts its input or replaces weights: a dense token would get the shift back that was never taken
            from it, or weights that it does not read; if a bias is beyond the range of the model's dtype; and as
            `applied`.
        """
        decoder = self.check(model)
        for site, rule in self.rules.items():
            if rule.shifts:
                raise PlanError(f"{self.method} shifts the input at {site}: such a plan cannot be folded")
            if rule.weight is not None:
                raise PlanError(f"{self.method} replaces the weights at {site}: such a plan cannot be folded")
            if rule.bias is not None and site.is_expert:
                raise PlanError(
                    f"{self.method} has a bias at {site}, and experts take none: such a plan cannot be folded"
                )
        biases = {site: rule.bias for site, rule in self.rules.items() if rule.bias is not None}
        if self.transform is not None:
            biases = {site: dense_bias(self.transform, decoder, site, bias) for site, bias in biases.items()}
        with with_biases(model, decoder, biases):
            rules = {site: replace(rule, bias=None) for site, rule in self.rules.items()}
            yield replace(self, rules=rules, model=fingerprint.of_model(model))

    def export(self, model: Any, folder: Path | str) -> Plan:
        """Saves `model` with the biases of this plan in its linear layers, and the masks in ``folder/masks``.

        What is saved is loaded by transformers alone, as a dense model with biases at every token (`folded`). The
        config says which layers have one, zeros where the plan has none. `model` is left as it was.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The model the plan was fitted on.
        folder : Path or str
            The model's folder, as `save_pretrained` writes it.

        Returns
        -------
        Plan
            The masks, which belong to the model that is loaded from `folder`.

        Raises
        ------
        UnsupportedModelError
            If the model's config cannot give one of the layers a bias.
        PlanError
            As `folded` and `save`; nothing is written then.
        """
        self.check_plain("exported")
        decoder, names = self.check(model), {module: name for name, module in model.named_modules()}
        biased = [names[decoder.projection(site).module] for site, rule in self.rules.items() if rule.bias is not None]
        shown = replace(self, info=card.public(self.info))
        with storable(model, biased), replace(shown, model=fingerprint.of_model(model)).folded(model) as masks:
            model.save_pretrained(folder)
        masks.save(Path(folder) / "masks")
        return masks

    def biases_only(self) -> Plan:
        """Gives the plan without its masks: what its biases do to a model that is not sparse.

        A shift stays, since its part of the bias only gives back what it takes, and so do replaced weights, whose
        part of the bias makes up for what they are.
        """
        carried = {site: rule for site, rule in self.rules.items() if rule.bias is not None}
        rules = {site: Rule(bias=r.bias, shift=r.shift, weight=r.weight) for site, r in carried.items()}
        return replace(self, rules=rules, neurons={})

    def meta(self) -> dict[str, Any]:
        """Gives all fields but rules, neuron masks and matrices: what plan.json and a model card say."""
        names = [field.name for field in fields(Plan) if field.name not in ("rules", "neurons", "transform")]
        others = {name: getattr(self, name) for name in names}
        return others if self.transform is None else others | {"transform": self.transform.meta()}

    def save(self, folder: Path | str) -> None:
        """Writes ``plan.json`` and ``rules.safetensors`` into `folder`, all or nothing.

        Raises
        ------
        PlanError
            If it is of a subclass (`check_plain`), if `info` is not JSON, or if `folder` holds something else.
        """
        self.check_plain("saved")
        meta = self.meta()
        tensors = {f"{site}/{k}": t for site, rule in self.rules.items() for k, t in rule.tensors().items()}
        masks = {site: mask.saved() for site, mask in self.neurons.items()}
        tensors |= {f"{site}/{name}": t for site, (_, held) in masks.items() for name, t in held.items()}
        if masks:  # other plans are read by older versions too
            meta["neurons"] = {str(site): values for site, (values, _) in masks.items()}
        if self.transform is not None:
            tensors |= {f"{stored.TRANSFORM}/{k}": t for k, t in self.transform.tensors().items()}
        stored.write(Path(folder), meta | {"sites": [str(site) for site in self.rules]}, tensors)

    @classmethod
    def load(cls, folder: Path | str) -> Plan:
        """Reads a plan; it can be applied only to the model it was fitted on.

        Raises
        ------
        PlanError
            If files are missing, damaged, of another format, or hold what no plan has.
        """
        if cls is not Plan:
            raise PlanError(f"files hold plans of the class Plan, none of {cls.__name__}: use Plan.load")
        try:
            meta, by_site = stored.read(Path(folder))
            saved = meta.pop("neurons", {})
            masks = {Site.parse(s): NeuronMask.of_saved(values, by_site.pop(s)) for s, values in saved.items()}
            matrices = by_site.pop(stored.TRANSFORM, {})
            if "transform" in meta:
                meta["transform"] = Transform.of_stored(meta["transform"], matrices)
            return cls(rules={Site.parse(s): _rule(s, t) for s, t in by_site.items()}, neurons=masks, **meta)
        except KeyError as error:
            raise PlanError(f"no readable plan in {folder}: it lacks {error}") from error
        except Exception as error:
            raise PlanError(f"no readable plan in {folder}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Uploads the plan and a model card into a repository of the Hugging Face hub, which is made where needed.

        Parameters
        ----------
        repo_id : str
            ``organisation/name``.
        private : bool
            Makes the repository private; one that is public already is refused.
        token : str or bool, optional
            Of the hub; the one that was logged in with where None.
        revision : str, optional
            A branch that is there already.
        commit_message : str, optional

        Returns
        -------
        str
            The address of the commit.

        Raises
        ------
        PlanError
            As `save`, or if the hub refuses or cannot be reached.
        """
        title = f"{self.method} at {self.target:g}"
        use = card.USE.format(repo_id=repo_id)
        readme = card.write(self.meta(), self.rules, title, card.ABOUT, use, neurons=self.neurons)
        save = replace(self, info=card.public(self.info)).save
        return hub.push(repo_id, save, readme, private, token, revision, commit_message or f"Plan: {title}")

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: Path | str | None = None,
        subfolder: str | None = None,
    ) -> Plan:
        """Fetches a plan from the Hugging Face hub; a folder on this machine is read by `load`.

        Parameters
        ----------
        repo_id : str
            ``organisation/name``.
        revision : str, optional
            A branch, tag or commit.
        token : str or bool, optional
        cache_dir : Path or str, optional
            Instead of the hub's own cache.
        subfolder : str, optional
            Where in the repository the plan is: ``masks`` of an exported model.

        Raises
        ------
        PlanError
            If there is no such repository, it has no plan, or the hub cannot be reached; and as `load`.
        """
        folder = hub.fetch(repo_id, revision, token, cache_dir, subfolder)
        try:
            return cls.load(folder)
        except PlanError as error:
            raise PlanError(f"{repo_id} on the hub: {error}") from error


def _rule(site: str, tensors: dict[str, torch.Tensor]) -> Rule:
    try:
        return Rule.from_tensors(tensors)
    except PlanError as error:
        raise PlanError(f"at {site}, {error}") from error
