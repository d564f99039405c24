"""`loratlas export`: an adapter as a plain LoRA or as merged weights."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratlas.commands.output import console, error_console, print_json
from loratlas.errors import UserError

if TYPE_CHECKING:
    from loratlas.engine.export import ExportReport

EXAMPLES = """[bold]Examples[/]

loratlas export runs/mine --to lora --out runs/mine-lora

loratlas export runs/mine --to lora --rank 16 --out small

loratlas export runs/mine --to merged --out model
"""


class Form(str, Enum):
    """What an adapter can be shipped as."""

    lora = "lora"
    merged = "merged"


def export(
    directory: Annotated[Path, typer.Argument(help="An adapter folder, or the output directory of `loratlas train`.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it replaces what is there.")],
    to: Annotated[
        Form, typer.Option(help="'lora': a LoRA folder for PEFT and servers. 'merged': the whole model.")
    ] = Form.lora,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of the LoRA; leave it out for an exact export.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model (name or path), if it is not where the adapter's config says.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Ship a trained adapter in a form that needs no LoRAtlas: a plain LoRA, or the merged model."""
    if to is Form.merged and rank is not None:
        raise UserError("--rank limits the rank of a LoRA; merged weights have none, so leave it out.")
    if out.resolve() == directory.resolve():
        raise UserError(f"--out {out} is the adapter itself; give another directory.")
    with error_console().status("loading the adapter on its base model"):
        from loratlas.analysis.adapter_folder import read_adapter
        from loratlas.engine.export import export_lora, export_merged
        from loratlas.train.adapted import load_adapted

        model = load_adapted(read_adapter(directory), base)
    with error_console().status("exporting"):
        report = export_lora(model, out, rank=rank) if to is Form.lora else export_merged(model, out)
    if as_json:
        print_json(report)
    else:
        console().print(_summary(report), soft_wrap=True, markup=False)


def _summary(report: ExportReport) -> str:
    if report.kind == "merged":
        return (
            f"Merged model written to {report.directory} ({report.tensors} tensors).\n"
            f'Load it without LoRAtlas: AutoModel....from_pretrained("{report.directory}")'
        )
    error = "exact" if report.relative_error == 0 else f"relative error {report.relative_error:.2e}"
    return (
        f"LoRA of rank {report.rank} written to {report.directory} ({report.tensors} tensors, {error}).\n"
        f'Stock PEFT loads it without LoRAtlas: PeftModel.from_pretrained(base, "{report.directory}")\n'
        f"Servers must accept its rank, for example: vllm serve ... --max-lora-rank {_next_rank(report.max_lora_rank)}"
    )


def _next_rank(rank: int) -> int:
    """The smallest value that vLLM allows for --max-lora-rank and that holds `rank`; `rank` if none does."""
    allowed = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    return next((value for value in allowed if value >= rank), rank)
