"""Tables of the site that are made from the code, so that they cannot go stale.

`<!-- catalogue -->` becomes the table of all systems, `<!-- options: module:Class -->` the options of a configuration.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

from loratlas.catalog import System, baselines, systems

_OPTIONS = re.compile(r"<!-- options: ([\w.]+):(\w+) -->")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if "<!-- catalogue -->" in markdown:
        pages = {path.stem for path in Path(page.file.abs_src_path).parent.glob("*.md")}
        markdown = markdown.replace("<!-- catalogue -->", _catalogue(pages))
    return _OPTIONS.sub(lambda found: _options(found[1], found[2]), markdown)


def _catalogue(pages: set[str]) -> str:
    lines = []
    for title, rows in (("Systems", systems()), ("Baselines", baselines())):
        lines += [f"## {title}", "", "| method | kind | paper | exports as | status | |", "|---|---|---|---|---|---|"]
        lines += [_row(row, pages) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _row(row: System, pages: set[str]) -> str:
    name = f"[{row.name}]({row.slug}.md)" if row.slug in pages else row.name
    paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})"
    cells = (f"{name} `{row.slug}`", row.kind, paper, ", ".join(row.exports), row.status, row.summary)
    return f"| {' | '.join(cells)} |"


def _options(module: str, name: str) -> str:
    cls = getattr(importlib.import_module(module), name)
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            lines.append(f"| `{field.name}` | `{default!r}` | {field.metadata['help'].replace('|', '&#124;')} |")
    return "\n".join(lines)
