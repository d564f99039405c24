"""Options of the scripts that time training steps, so that one name means one thing in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch.")]
SettingNames = Annotated[list[str] | None, typer.Option(help="Only settings of these names; repeatable.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny encoders, to see that it runs.")]
Out = Annotated[Path, typer.Option(help="Where the JSON goes.")]
