"""Time of the circuit, forward and backward, beside other simulators, over qubits, layers and tokens.

Gradients of sum(weights * <Z>) for inputs and angles. Before it is timed, an engine's values and gradients are compared with ours
in float64. Engines take turns within a cell, so that a drift of the machine's speed hits all alike; short runs are repeated in a
turn, since the first after another engine finds cold caches. Printed are medians, and the median of the ratios to ours of each
turn. Cells that would take an engine more than --limit seconds or the free memory are left out, and said to be.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from axolotl_qtha.bench import arguments
from axolotl_qtha.bench.circuit_peers import ENGINES, Engine, GradientFunction
from axolotl_qtha.bench.circuit_plot import plot
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.program import program
from axolotl_qtha.circuit.torch_engine import expectation_values
from axolotl_qtha.terminal import console
from axolotl_qtha.timing import kept_bytes, seconds

QUBITS, LAYERS, TOKENS = (2, 4, 6, 8, 10, 12), (1, 4, 8), (256, 2048, 8192)
TOLERANCE = 1e-4  # float32, and gradients of size 10
OURS = "ours"
Row = dict[str, Any]


def inputs(ansatz: Ansatz, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random z (tokens, n), angles (rows, n) in radians, and weights (tokens, n)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, ansatz.qubits), (ansatz.rows, ansatz.qubits), (tokens, ansatz.qubits))
    z, angles, weights = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return z, angles, weights


def difference(run: GradientFunction, ansatz: Ansatz, device: torch.device, tokens: int = 2) -> float:
    """Return the largest difference of values and gradients from ours in float64."""
    given = inputs(ansatz, tokens, device)
    exact = ENGINES["ours, float64"].build(ansatz)(*given)
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(run(*given), exact, strict=True))


def peak_growth(run: Callable[[], object], device: torch.device) -> float:
    """Return by how many MiB a run grows the process (on CUDA, the allocator) at most."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return (peak - before) / 2**20


class Bench:
    """All cells, with what is known so far of each engine's speed."""

    def __init__(self, engines: Sequence[Engine], repeats: int, limit: float, device: torch.device) -> None:
        self.engines, self.repeats, self.limit, self.device = engines, repeats, limit, device
        self.rates: dict[str, float] = {}  # seconds per amplitude, gate and token, of the last cell
        self.skipped: dict[str, str] = {}  # engine or cell -> reason

    def cell(self, ansatz: Ansatz, tokens: int) -> list[Row]:
        """Measure all engines on one circuit."""
        runs: dict[str, Callable[[], object]] = {}
        scale, growth = dict[str, float](), dict[str, float]()
        for engine in self.engines:
            used = min(tokens, engine.most_tokens or tokens)
            if (run := self._checked(engine, ansatz, used)) is None:
                continue
            given = inputs(ansatz, used, self.device)
            runs[engine.name] = partial(run, *given)
            scale[engine.name] = tokens / used
            growth[engine.name] = peak_growth(runs[engine.name], self.device)  # also the warm-up
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, call in runs.items():
                times[name].append(scale[name] * self._turn(call))
        rows = []
        for name, values in times.items():
            median = statistics.median(values)
            self.rates[name] = median / tokens / _work(ansatz)
            ratio = statistics.median(a / b for a, b in zip(values, times.get(OURS, values), strict=True))
            cell = {"qubits": ansatz.qubits, "layers": ansatz.layers, "tokens": tokens, "engine": name}
            memory = growth[name] if scale[name] == 1 else None
            rows.append(cell | {"milliseconds": 1e3 * median, "to_ours": ratio, "peak_mib": memory})
        return rows

    def _turn(self, call: Callable[[], object]) -> float:
        """Return the seconds of a run, the median of up to five within 0.2 s."""
        values = [seconds(call, self.device)]
        while len(values) < 5 and sum(values) < 0.2:
            values.append(seconds(call, self.device))
        return statistics.median(values[1:] or values)

    def _checked(self, engine: Engine, ansatz: Ansatz, tokens: int) -> GradientFunction | None:
        """Return an engine that is installed, right, fast and small enough."""
        if engine.name in self.skipped:
            return None
        where = f"{engine.name}, {ansatz.qubits} qubits, {ansatz.layers} layers, {tokens} tokens"
        expected = self.rates.get(engine.name, 0.0) * tokens * _work(ansatz)
        if expected > self.limit:
            self.skipped[where] = f"about {expected:,.0f} s a run, --limit is {self.limit:g}"
            return None
        needed = 8 * engine.keeps * tokens * _work(ansatz)
        if needed > psutil.virtual_memory().available / 2:
            self.skipped[where] = f"would keep about {needed / 2**30:,.0f} GiB for backward"
            return None
        try:
            run = engine.build(ansatz)
        except ImportError as error:
            self.skipped[engine.name] = f'not installed ({error.name}): pip install "axolotl-qtha[bench]"'
            return None
        if expected < self.limit / 10 and (off := difference(run, ansatz, self.device)) > TOLERANCE:
            self.skipped[engine.name] = f"wrong by {off:.1e} on {ansatz.qubits} qubits, {ansatz.layers} layers: not timed"
            return None
        return run


def _work(ansatz: Ansatz) -> int:
    """Amplitudes times gates, which the time of a simulator goes with."""
    return ansatz.qubits * len(ansatz.moments()) * 2**ansatz.qubits


def exponent(sizes: Iterable[float], times: Iterable[float]) -> float:
    """Return the slope of log(time) over log(size), by least squares."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(times)), 1)[0])


def growth(device: torch.device, repeats: int, small: bool = False) -> list[Row]:
    """Return the fitted exponents of our time: in tokens, in layers, and in 2^n n."""
    series: dict[
        str, list[tuple[int, int, int]]
    ] = {  # (qubits, layers, tokens), large enough to drown what a call costs by itself
        "tokens": [(8, 4, tokens) for tokens in (2048, 4096, 8192, 16384)],
        "layers": [(8, layers, 2048) for layers in (4, 8, 16, 32)],
        "2^n n": [(qubits, 4, 4096) for qubits in (6, 8, 10, 12)],
    }
    rows = []
    for name, cells in series.items():
        cells = [(q, layers, tokens // 16) for q, layers, tokens in cells] if small else cells
        sizes = [t if name == "tokens" else layers if name == "layers" else 2**q * q for q, layers, t in cells]
        runs = [(ENGINES[OURS].build(Ansatz(q, layers)), inputs(Ansatz(q, layers), t, device)) for q, layers, t in cells]
        turns = [[seconds(partial(run, *given), device) for run, given in runs] for _ in range(repeats + 1)][1:]
        times = [statistics.median(values) for values in zip(*turns, strict=True)]
        rows.append({"of": name, "exponent": exponent(sizes, times), "cells": cells, "seconds": times})
    return rows


def kept(tokens: int = 2048, qubits: int = 8) -> dict[int, int]:
    """Return the bytes our engine keeps between forward and backward, by the number of layers."""
    result = {}
    for layers in (1, 16):
        ansatz = Ansatz(qubits, layers)
        z = torch.randn(tokens, qubits, requires_grad=True)
        angles = torch.nn.Parameter(torch.randn(ansatz.rows, qubits))
        result[layers] = kept_bytes(partial(expectation_values, z, angles, ansatz))
    return result


def operations(ansatz: Ansatz) -> int:
    """Return the floating-point operations of one token, forward and backward with its recomputation, as the engine does them.

    Per amplitude: a rotation is 6 (two products and a sum, real and imaginary), a phase 6, an overlap 4; see `circuit.cpp`.
    """
    n, walls = ansatz.qubits, len(program(ansatz).walls)
    state = 2 + (walls - 1) * (6 + 6 * n)
    read_out = 7
    adjoint = 4 + (walls - 1) * (12 * n + 4 * n + 4 + 12) + 4 * n  # take walls off two states, overlaps, take phases off
    return 2**n * (state + read_out + state + adjoint)


def peak_rate(device: torch.device) -> float:
    """Return the float32 operations per second of a large matrix product."""
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    return 2 * 2048**3 / min(seconds(partial(torch.mm, a, b), device) for _ in range(5))


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments.parser(__doc__, tokens=TOKENS, repeats=3)
    options.add_argument("--qubits", type=int, nargs="+", default=QUBITS, help="qubits of the circuit")
    options.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="layers of the circuit")
    options.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), metavar="NAME", help="simulators")
    options.add_argument("--limit", type=float, default=5.0, help="seconds a run may take")
    options.add_argument("--quick", action="store_true", help="small cells for the exponents")
    options.add_argument("--plot", type=Path, help="write a plot to this file (PNG, PDF, SVG)")
    args = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    out = console()
    bench = Bench([ENGINES[name] for name in args.engines], args.repeats, args.limit, device)
    cells = [(q, layers, t) for q in sorted(args.qubits) for layers in sorted(args.layers) for t in sorted(args.tokens)]
    rows: list[Row] = []
    start = time.monotonic()
    for q, layers, tokens in track(cells, description="measuring", console=out):
        rows += bench.cell(Ansatz(q, layers), tokens)
    out.print(_table(rows, f"forward + backward, {where}, float32, medians of {args.repeats} turns"))
    for what, reason in bench.skipped.items():
        out.print(f"left out: {what}: {reason}", highlight=False, markup=False)
    peak = peak_rate(device)
    for row in (row for row in rows if row["engine"] == OURS and row["tokens"] == max(args.tokens)):
        row["flop_per_second"] = operations(Ansatz(row["qubits"], row["layers"])) * row["tokens"] / row["milliseconds"] * 1e3
    best = max((row.get("flop_per_second", 0.0) for row in rows), default=0.0)
    exponents, memory = growth(device, args.repeats, args.quick), kept()
    for fit in exponents:
        out.print(f"time grows with {fit['of']} to the power {fit['exponent']:.2f}", highlight=False)
    words = ", ".join(f"{size / 1024:.1f} KiB with {layers} layers" for layers, size in memory.items())
    out.print(f"kept for backward, 8 qubits, 2048 tokens: {words} (z alone is 64)", highlight=False)
    out.print(f"ours: up to {best / 1e9:.0f} GFLOP/s; a 2048 x 2048 matrix product here: {peak / 1e9:.0f}", highlight=False)
    out.print(f"{time.monotonic() - start:.0f} s in all", highlight=False)
    figures = {
        "where": where,
        "rows": rows,
        "skipped": bench.skipped,
        "growth": exponents,
        "kept_bytes": memory,
        "peak_flops": peak,
    }
    arguments.write_json(args, figures)
    if args.plot:
        plot(rows, f"forward + backward of the circuit, {where}, float32", args.plot)


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for column in ("qubits", "layers", "tokens", "engine", "ms", "x ours", "peak MiB"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for i, row in enumerate(rows):
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        digits = max(0, 2 - int(math.log10(max(row["milliseconds"], 1e-3))))
        cells = (row["qubits"], row["layers"], row["tokens"], row["engine"], f"{row['milliseconds']:,.{digits}f}")
        last = i + 1 == len(rows) or rows[i + 1]["engine"] == rows[0]["engine"]
        table.add_row(*map(str, cells), f"{row['to_ours']:,.1f}", memory, end_section=last)
    return table


if __name__ == "__main__":
    main()
