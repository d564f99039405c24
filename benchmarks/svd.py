"""Time and accuracy of the three methods of `loratlas.linalg.svd.top_svd`.

    python benchmarks/svd.py --shapes 768x768 768x3072 --ranks 32 --rounds 7 --json svd.json

Every round runs all methods once, one after the other, so that a slow moment of the machine hits them all; reported are
ratios to "full" within a round (median, minimum to maximum over the rounds). One untimed round warms up. The matrices
are float32 with sigma_i = i^-exponent and random singular vectors; 0.05 is a nearly flat spectrum, at 0 the singular
vectors would not be defined.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loratlas.files import write_json
from loratlas.linalg.svd import choose_method, top_svd

METHODS = ("full", "gram", "lowrank")
DEFAULT_SHAPES = [(384, 384), (768, 768), (384, 1536), (768, 3072)]


@dataclass
class Row:
    """One method on one matrix. speedup: time of "full" / time of this method; seconds: median over the rounds."""

    shape: str
    k: int
    method: str
    chosen: bool
    seconds: float
    speedup: float
    speedup_min: float
    speedup_max: float
    sigma_error: float
    cosine: float


def spectrum_matrix(m: int, n: int, exponent: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W (m, n) float32 with its exact sigma (d,) and right vectors (d, n), both float64, known by construction."""
    generator = torch.Generator().manual_seed(seed)
    d = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(rows, d, generator=generator, dtype=torch.float64)).Q for rows in (m, n))
    sigma = torch.arange(1, d + 1, dtype=torch.float64) ** -exponent
    return ((u * sigma) @ v.T).float(), sigma, v.T


def parse_shape(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 768x3072")
    return int(sides[0]), int(sides[1])


def parse_exponent(text: str) -> float:
    try:
        exponent = float(text)
    except ValueError:
        exponent = 0.0
    if not exponent > 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return exponent


def measure(m: int, n: int, k: int, rounds: int, exponent: float, seed: int, device: str) -> list[Row]:
    """Interleaved timings of all methods for the top k of one matrix, with the error of what they returned."""
    matrix, sigma, right = spectrum_matrix(m, n, exponent, seed)
    matrix = matrix.to(device)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    found = {}
    for round_ in range(rounds + 1):
        for method in METHODS:
            synchronise(device)
            start = time.perf_counter()
            found[method] = top_svd(matrix, k, method=method, seed=seed)
            synchronise(device)
            if round_ > 0:
                seconds[method].append(time.perf_counter() - start)
    rows = []
    for method in METHODS:
        ratios = [full / own for full, own in zip(seconds["full"], seconds[method], strict=True)]
        _, s, vh = (tensor.double().cpu() for tensor in found[method])
        rows.append(
            Row(
                shape=f"{m}x{n}",
                k=k,
                method=method,
                chosen=choose_method(m, n, k) == method,
                seconds=statistics.median(seconds[method]),
                speedup=statistics.median(ratios),
                speedup_min=min(ratios),
                speedup_max=max(ratios),
                sigma_error=float(((s - sigma[:k]) / sigma[:k]).abs().max()),
                cosine=float(torch.linalg.svdvals(vh @ right[:k].T).min()),
            )
        )
    return rows


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def show(rows: list[Row], console: Console) -> None:
    table = Table(title='Top-k SVD; * marks what method="auto" chooses')
    for heading in ("shape", "k", "method", "ms", "full / method (min-max)", "max rel. sigma error", "min cosine"):
        table.add_column(heading, justify="left" if heading in ("shape", "method") else "right")
    for row in rows:
        table.add_row(
            row.shape,
            str(row.k),
            row.method + (" *" if row.chosen else ""),
            f"{row.seconds * 1e3:.1f}",
            f"{row.speedup:.2f} ({row.speedup_min:.2f}-{row.speedup_max:.2f})",
            f"{row.sigma_error:.1e}",
            f"{row.cosine:.6f}",
            end_section=row.method == METHODS[-1],
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=DEFAULT_SHAPES, metavar="MxN")
    parser.add_argument("--ranks", nargs="+", type=int, default=[32], metavar="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exponent", type=parse_exponent, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="PATH", help="also write the rows and the settings to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for m, n in options.shapes:
        for k in options.ranks:
            rows += measure(m, n, k, options.rounds, options.exponent, options.seed, options.device)
    show(rows, Console())
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"torch": torch.__version__, "settings": settings, "rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    main()
