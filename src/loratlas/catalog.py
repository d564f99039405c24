"""The catalogue: all systems of the library as data, read from `catalog.yaml`."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import importlib.resources
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from loratlas.errors import UserError

KINDS = (
    "adapter",
    "optimizer",
    "strategy",
    "objective",
    "compose",
    "diffusion",
    "surgery",
    "federated",
    "analysis",
    "app",
)


@dataclass(frozen=True)
class System:
    """One row.

    Attributes:
        paper: arXiv id.
        exports: what a result can be shipped as: "lora" (a plain LoRA), "merged" (merged weights), "native" (its own
            form), "none".
        official: repository of the official code.
        entry: "module:name" of its configuration class; empty while it is planned.
        lr: learning rate of the demo.
        options: fields of the configuration that make this entry what it is.
    """

    slug: str
    name: str
    paper: str
    kind: str
    summary: str
    exports: tuple[str, ...]
    official: str = ""
    entry: str = ""
    lr: float | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def year(self) -> int:
        """Year of the paper's first version."""
        return 2000 + int(self.paper[:2])

    @property
    def status(self) -> str:
        return "implemented" if self.entry else "planned"

    def row(self) -> dict[str, Any]:
        """Everything as JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "exports": list(self.exports), "year": self.year, "status": self.status}


def systems(pattern: str = "*", kind: str | None = None, status: str | None = None) -> list[System]:
    """The systems whose slug or name matches the shell pattern, of one kind or status if given, by kind and slug."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"there is no kind {kind!r}; kinds: {', '.join(KINDS)}.")
    rows = _load()["systems"].values()
    found = [
        row for row in rows if _matches(row, pattern) and kind in (None, row.kind) and status in (None, row.status)
    ]
    return sorted(found, key=lambda row: (KINDS.index(row.kind), row.slug))


def baselines() -> list[System]:
    """What the systems are compared with; not part of the catalogue's count."""
    return list(_load()["baselines"].values())


def find(slug: str) -> System:
    """The system or baseline of that name.

    Raises:
        UserError: there is none; the message suggests the nearest.
    """
    known = {**_load()["systems"], **_load()["baselines"]}
    if slug in known:
        return known[slug]
    near = difflib.get_close_matches(slug.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`loratlas methods` lists what there is."
    raise UserError(f"there is no method {slug!r}: {hint}")


def load_entry(system: System) -> type:
    """The configuration class of a system.

    Raises:
        UserError: it is only planned, or a package it needs is missing.
    """
    if not system.entry:
        raise UserError(
            f"{system.slug} is planned and not implemented yet; `loratlas methods --implemented` lists what is."
        )
    module, _, name = system.entry.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"{system.slug} needs a package that is missing: {error}.") from None


def _matches(row: System, pattern: str) -> bool:
    return fnmatch.fnmatch(row.slug, pattern) or fnmatch.fnmatch(row.name.lower(), pattern.lower())


@functools.cache
def _load() -> dict[str, dict[str, System]]:
    text = importlib.resources.files("loratlas").joinpath("catalog.yaml").read_text(encoding="utf-8")
    lists = yaml.safe_load(text)
    return {part: {slug: _system(slug, row) for slug, row in rows.items()} for part, rows in lists.items()}


def _system(slug: str, row: dict[str, Any]) -> System:
    unknown = set(row) - {f.name for f in fields(System)}
    if unknown or row.get("kind") not in KINDS:
        raise RuntimeError(f"catalog.yaml, {slug}: unknown kind {row.get('kind')!r} or fields {sorted(unknown)}")
    return System(slug=slug, **{**row, "exports": tuple(row["exports"])})
