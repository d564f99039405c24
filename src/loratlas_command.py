"""Entry point of the `loratlas` command.

A module of its own, so that the package can see that the command is running and leave torch unloaded until it is
needed.
"""

from __future__ import annotations


def main() -> None:
    from loratlas.cli import main as run

    run()
