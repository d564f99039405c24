"""`loratlas export`: an adapter as a plain LoRA or as merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratlas.commands.output import console, error_console, print_json
from loratlas.errors import UserError

if TYPE_CHECKING:
    from loratlas.engine.export import ExportReport
    from loratlas.engine.reload import Verification

EXAMPLES = """[bold]Examples[/]

loratlas export runs/mine --to lora --out runs/mine-lora

loratlas export runs/mine --to lora --rank 16 --dtype bfloat16 --out small

loratlas export runs/mine --to lora --heads beside --check vllm --out served

loratlas export runs/mine --to merged --out model
"""

_LORA = "LoRA"


class Form(str, Enum):
    """What an adapter can be shipped as."""

    lora = "lora"
    merged = "merged"


class Precision(str, Enum):
    """dtype of a LoRA's factors in the file."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Ranks(str, Enum):
    one = "one"
    each = "each"


class Heads(str, Enum):
    """Where modules saved whole go."""

    inside = "inside"
    beside = "beside"


class Server(str, Enum):
    """What a LoRA can be checked for."""

    vllm = "vllm"
    sglang = "sglang"
    diffusers = "diffusers"


def export(
    directory: Annotated[Path, typer.Argument(help="An adapter folder, or the output directory of `loratlas train`.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it replaces what is there.")],
    to: Annotated[
        Form, typer.Option(help="'lora': a LoRA folder for PEFT and servers. 'merged': the whole model.")
    ] = Form.lora,
    base: Annotated[
        str | None, typer.Option(help="Base model (name or path), if it is not where the adapter's config says.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Largest rank; leave it out for an exact export.", rich_help_panel=_LORA),
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of the file; the error is printed.", rich_help_panel=_LORA)
    ] = Precision.float32,
    ranks: Annotated[
        Ranks,
        typer.Option(
            help="'one' rank for all modules, as servers want it, or 'each' module its own, for stock PEFT.",
            rich_help_panel=_LORA,
        ),
    ] = Ranks.one,
    heads: Annotated[
        Heads,
        typer.Option(
            help="A trained head 'inside' the file, for stock PEFT, or 'beside' it in head/, for servers.",
            rich_help_panel=_LORA,
        ),
    ] = Heads.inside,
    check: Annotated[
        Server | None,
        typer.Option(help="Refuse to write what this server would not serve.", rich_help_panel=_LORA),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            help="For diffusers: the pipeline's component that the model is, such as unet, transformer, text_encoder.",
            rich_help_panel=_LORA,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(help="Load the file with stock PEFT in a clean process and compare.", rich_help_panel=_LORA),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Ship a trained adapter in a form that needs no LoRAtlas: a plain LoRA, or the merged model."""
    if to is Form.merged:
        _refuse_lora_options(rank, dtype, ranks, heads, check, component)
    if out.resolve() == directory.resolve():
        raise UserError(f"--out {out} is the adapter itself; give another directory.")
    with error_console().status("loading the adapter on its base model"):
        import torch

        from loratlas.analysis.adapter_folder import read_adapter
        from loratlas.engine.export import export_lora, export_merged
        from loratlas.train.adapted import load_adapted

        model = load_adapted(read_adapter(directory), base)
    with error_console().status("exporting and loading it again with stock PEFT" if verify else "exporting"):
        if to is Form.merged:
            report = export_merged(model, out)
        else:
            report = export_lora(
                model,
                out,
                rank=rank,
                dtype=getattr(torch, dtype.value),
                ranks=ranks.value,
                heads=heads.value,
                component=component,
                check=check.value if check else None,
                verify=verify,
            )
    if as_json:
        print_json(report)
    else:
        console().print("\n".join(_summary(report)), soft_wrap=True, markup=False)


def _refuse_lora_options(
    rank: int | None, dtype: Precision, ranks: Ranks, heads: Heads, check: Server | None, component: str | None
) -> None:
    if rank is not None:
        raise UserError("--rank limits the rank of a LoRA; merged weights have none, so leave it out.")
    given = {
        "--dtype": dtype is not Precision.float32,
        "--ranks": ranks is not Ranks.one,
        "--heads": heads is not Heads.inside,
        "--check": check is not None,
        "--component": component is not None,
    }
    for option, is_given in given.items():
        if is_given:
            raise UserError(f"{option} is an option of --to lora; leave it out for merged weights.")


def _summary(report: ExportReport) -> Iterator[str]:
    if report.kind == "merged":
        yield f"Merged model written to {report.directory} ({report.tensors} tensors)."
        yield f'Load it without LoRAtlas: AutoModel....from_pretrained("{report.directory}")'
        return
    cut = f" ({report.exact_rank} would be exact)" if report.rank < report.exact_rank else ""
    error = "exact" if report.relative_error == 0 else f"relative error {report.relative_error:.1e}"
    width = f"padded to {report.padded_rank}" if report.padded_rank else "each module its own"
    yield (
        f"LoRA written to {report.directory} ({report.tensors} tensors): rank {report.rank}{cut}, {width}, "
        f"{report.dtype}, {error}."
    )
    if report.heads:
        yield f"Beside it in head/: {', '.join(report.heads)}."
    if report.verification is not None:
        yield _outcome(report.verification)
    yield f'Stock PEFT loads it without LoRAtlas: PeftModel.from_pretrained(base, "{report.directory}")'
    if report.max_lora_rank is not None:
        yield f"Servers must accept its rank, for example: vllm serve ... --max-lora-rank {report.max_lora_rank}"
    yield from report.remarks


def _outcome(found: Verification) -> str:
    layers = f"Loaded again by stock PEFT in a clean process: {found.layers} layers agree {_to(found.layer_difference)}"
    if found.output_difference is None:
        return f"{layers}; outputs of the whole model not compared, {found.remark}."
    difference = f"differ by {found.output_difference:.1e}, at most {found.output_max:.1e}"
    return f"{layers}, outputs of the whole model {difference if found.output_difference else 'agree exactly'}."


def _to(difference: float) -> str:
    return f"to {difference:.0e}" if difference else "exactly"
