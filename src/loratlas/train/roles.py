"""Who takes part in a run: an adapter or the base model's own weights, and beside it an optimizer, an objective and a
strategy of the catalogue.

    lora                      a PEFT adapter, trained by AdamW on the task's own loss
    srlora+lora-pro           an adapter and an optimizer; also method: srlora, optimizer: lora-pro
    galore, lisa              parts that train the base model's own weights: no adapter
    lora-pro, ba-lora         parts that need an adapter: plain LoRA

The options of a run are those of its method: of the adapter, and of galore or lisa where that is the method. Parts
beside it have option mappings of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn

from loratlas.catalog import System, load_entry
from loratlas.engine.calibrate import needs
from loratlas.engine.method import RELATIVE_FISHER
from loratlas.engine.parts import Part
from loratlas.errors import UserError
from loratlas.train.methods import (
    FALLBACK_LR,
    configuration,
    default_options,
    option_problems,
    option_values,
    trainable,
    trains_pairs,
)
from loratlas.train.recipe import OPTION_MAPS, PARTS, Recipe
from loratlas.train.spec import RunSpec

FORGET = "forget"
SETS = (FORGET,)  # what runs can carry beside the training rows
PLAIN = "lora"  # the adapter of parts that need one and were named without


class Member(NamedTuple):
    """One who takes part, with the options given for it. field: where its slug stands, one of `OPTION_MAPS`."""

    system: System
    options: dict[str, Any]
    field: str

    @property
    def map(self) -> str:
        """The field of the run that holds its options."""
        return OPTION_MAPS[self.field]

    def part(self) -> Any:
        """Its configuration; only for parts, see `methods.build_config` for adapters."""
        return configuration(self.system, self.options)

    def values(self) -> dict[str, Any]:
        """Its options with every default written out."""
        return option_values(self.system, self.part())


@dataclass(frozen=True)
class Cast:
    """Who takes part in one run; `adapter` is None where the base model's own weights train."""

    adapter: Member | None
    optimizer: Member | None = None
    objective: Member | None = None
    strategy: Member | None = None

    @property
    def parts(self) -> list[Member]:
        """All but the adapter; the one that is the run's method first."""
        found = [part for part in (self.optimizer, self.objective, self.strategy) if part is not None]
        return sorted(found, key=lambda part: part.field != "method")

    @property
    def members(self) -> list[Member]:
        return [*([self.adapter] if self.adapter else []), *self.parts]

    @property
    def name(self) -> str:
        """The slugs, as "srlora+lora-pro"."""
        return "+".join(member.system.slug for member in self.members)

    @property
    def label(self) -> str:
        return " + ".join(member.system.name for member in self.members)

    @property
    def rate(self) -> float:
        """The catalogued learning rate: of the optimizer, else of the strategy, else of the adapter."""
        order = (self.optimizer, self.strategy, self.adapter)
        return next((member.system.lr for member in order if member and member.system.lr), FALLBACK_LR)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(field of the run, what is wrong) for options, and for members that do not go together."""
        wrong = set()
        for member in self.members:
            for name, text in option_problems(member.system, member.options):
                wrong.add(member.field)
                yield f"{member.map}.{name}", text
        for part in self.parts:
            if part.field not in wrong:
                yield from self._misfit(part)

    def _misfit(self, part: Member) -> Iterator[tuple[str, str]]:
        slug, cls = part.system.slug, _class(part.system)
        if cls.needs_pairs and self.adapter is None:
            yield part.field, f"{slug} works on low-rank pairs, but {self._base()} trains no adapter: leave one out."
        elif cls.needs_pairs and self.adapter is not None and not _has_pairs(self.adapter):
            yield (
                part.field,
                f"{slug} works on low-rank pairs s B A, which {self.adapter.system.slug} does not train: choose "
                "another method, such as lora.",
            )
        # an optimizer takes whatever trains, but a strategy says itself which of the model's weights these are
        if part.field == "strategy" and cls.trains_base and self.adapter is not None:
            yield (
                part.field,
                f"{slug} trains the base model's own weights, which the adapter of {self.adapter.system.slug} leaves "
                f"frozen: take {slug} as the method, without an adapter.",
            )

    @property
    def sets(self) -> dict[str, str]:
        """{set of rows that the run needs beside the training rows: slug of the member that asks for it}."""
        found: dict[str, str] = {}
        if self.objective is not None:
            found |= dict.fromkeys(self.objective.part().sets, self.objective.system.slug)
        if self.adapter is not None and compares(configuration(self.adapter.system, self.adapter.options)):
            found.setdefault(FORGET, self.adapter.system.slug)
        return found

    def lacking(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(set, what is wrong) for those in `sets` that `given` has not."""
        for name, slug in self.sets.items():
            if given.get(name) is None:
                how = (
                    f"give it with --{name}, or as {name} in a recipe."
                    if name in SETS
                    else "train it in your own loop."
                )
                yield name, f"{slug} needs a {name} set beside the training rows: {how}"

    def idle(self, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(set, what is wrong) for those in `given` that nobody asks for."""
        for name in SETS:
            if given.get(name) is not None and name not in self.sets:
                yield name, f"{name} is given, but {self.name} has no use for it: add an objective that needs it."

    def _base(self) -> str:
        return " and ".join(part.system.slug for part in self.parts if _class(part.system).trains_base)

    def check(self, model: nn.Module) -> None:
        """Raise `UserError` if a part cannot work with `model`, adapted or not."""
        for part in self.parts:
            part.part().check(model)


def spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe or run with every member in its own field and its options in their own mapping.

    "srlora+lora-pro" becomes method srlora and optimizer lora-pro, "lora-pro" alone method lora and optimizer lora-pro.

    Raises:
        UserError: an unknown or planned slug, two of a kind, one that is not of its field's kind.
    """
    named: dict[str, str] = {}
    for field in OPTION_MAPS:
        for slug in (values.get(field) or "").split("+") if values.get(field) else ():
            kind = trainable(slug).kind
            if field not in ("method", kind):
                raise UserError(f"{field} is {slug}, which is of kind {kind}: give it as {_field(kind)}.", field=field)
            if named.get(kind, slug) != slug:
                raise UserError(
                    f"{named[kind]} and {slug} are both of kind {kind}, and a run has one of each kind.", field=field
                )
            named[kind] = slug
    base = next((kind for kind, slug in named.items() if kind != "adapter" and _trains_base(slug)), None)
    maps = {name: dict(values.get(name) or {}) for name in OPTION_MAPS.values()}
    if "adapter" in named or base is None:
        method = named.pop("adapter", PLAIN)
    else:
        method = named.pop(base)
        maps["options"] |= maps.pop(OPTION_MAPS[base])
    given = {name: maps.get(name, {}) for name in OPTION_MAPS.values()}
    return {**values, "method": method, **{kind: named.get(kind) for kind in PARTS}, **given}


def complete(spec: RunSpec) -> RunSpec:
    """`spec` as `spelled_out` has it."""
    fields = (*OPTION_MAPS, *OPTION_MAPS.values())
    known = spelled_out({name: getattr(spec, name) for name in fields})
    return replace(spec, **known)


def cast(spec: RunSpec | Recipe | SimpleNamespace) -> Cast:
    """The cast of a `RunSpec` or `Recipe` that is spelled out."""
    found: dict[str, Member | None] = {"adapter": None}
    for field, options in OPTION_MAPS.items():
        slug = getattr(spec, field)
        if slug is not None:
            system = trainable(slug)
            found[system.kind] = Member(system, getattr(spec, options), field)
    return Cast(**found)


def with_defaults(recipe: Recipe) -> Recipe:
    """`recipe`, which is spelled out, with every option of its members written out."""
    fields: dict[str, Any] = {each.map: default_options(each.system) | each.options for each in cast(recipe).members}
    return replace(recipe, **fields)


def compares(config: Any) -> bool:
    """Whether the start of this adapter configuration compares the training rows with the forget set."""
    return RELATIVE_FISHER in needs(config)


def _trains_base(slug: str) -> bool:
    return _class(trainable(slug)).trains_base


def _class(part: System) -> type[Part]:
    return load_entry(part)


def _has_pairs(adapter: Member) -> bool:
    return trains_pairs(configuration(adapter.system, adapter.options))


def _field(kind: str) -> str:
    return "method" if kind == "adapter" else kind
