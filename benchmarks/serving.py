"""`python -m benchmarks.serving`: our server beside others that serve the same model to the same requests.

Trains the flights model once, starts every server, compares all answers with the model's own, then loads them
in turn in short rounds, so that a busy moment of the machine hits all alike. docs/benchmarks.md says how.
Figures: benchmarks/out/serving.json; the plot: docs/images/serving.png.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measure import median
from benchmarks.peers import flights as model
from benchmarks.peers import generator, report
from benchmarks.peers.measured import Cell, Measured, Wire
from benchmarks.peers.servers import PEERS, Running, Server, ours, peers
from perennial.installation import REPOSITORY

OUT = REPOSITORY / "benchmarks" / "out"
LOGS = OUT / "serving-logs"  # what the servers of the last run said
OURS = ("ours", "ours_original", "empty")
CONCURRENCY = (1, 8, 64)
SECONDS = {1: 1.5, 100: 1.2}  # of a cell, by rows of a request
ROUNDS = 5
STARTS = 3  # of ours: the figure is their median
IDLE_SECONDS = 3.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="one short round; no figures, no plot")
    arguments.add_argument(
        "--only", help=f"some of {', '.join((*OURS, *PEERS))}, by commas; no figures, no plot"
    )
    chosen = arguments.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.stdout.reconfigure(line_buffering=True)
    only = chosen.only.split(",") if chosen.only else [*OURS, *PEERS]
    if unknown := set(only) - {*OURS, *PEERS}:
        sys.exit(f"no server {', '.join(unknown)}; there are {', '.join((*OURS, *PEERS))}")

    print("the model: environment, training, compiling")
    flights = model.train(OUT)
    print(f"served by the {flights.plan.path} model: {flights.plan.reason}")
    work = OUT / "serving-work"
    for folder in (work, LOGS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    servers = [server for server in ours(flights, work) if server.name in only]
    servers += peers(flights, OUT, only.__contains__)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        measured = _measure(stack, servers, flights, work, quick=chosen.quick)
        partial = chosen.quick or chosen.only is not None
        report.write(measured, OUT / "serving-partial.json" if partial else OUT / "serving.json")
        image = OUT / "serving.png" if partial else REPOSITORY / "docs" / "images" / "serving.png"
        report.draw(measured, image)


def _measure(
    stack: ExitStack, servers: list[Server], flights: model.Flights, work: Path, *, quick: bool
) -> Measured:
    measured = Measured(bare=model.bare(flights))
    rows, measured.every_flight = model.every_flight(flights)
    print(f"all {rows:,} flights: what is served is at most {measured.every_flight:.1e} from Model.predict")
    print("\nstarting, one after another")
    running = [
        found
        for server in servers
        if (found := _start(stack, server, work, measured, 1 if quick else STARTS))
    ]
    _measure_idle(running)
    wires = {one.server.name: Wire.of(one.server, flights, work) for one in running}
    print("\nanswers against the model's own predict, no load")
    running = [one for one in running if _compare(one, wires[one.server.name], measured)]
    measured.first_rss_mb = {one.server.name: one.rss_mb() for one in running}
    for number in range(1 if quick else ROUNDS):
        began = time.monotonic()
        _round(running, wires, measured, 0.7 if quick else 1.0)
        print(f"round {number + 1} took {time.monotonic() - began:.0f} s")
    for one in running:
        measured.rss_mb[one.server.name] = one.rss_mb()
    generator.compare(running, wires, work)
    return measured


def _compare(one: Running, wire: Wire, measured: Measured) -> bool:
    name = one.server.name
    if name != "empty":
        try:
            measured.differences[name] = wire.compare(one.port)
        except (OSError, RuntimeError) as error:
            if name in OURS:
                raise
            print(f"{one.server.label} is left out: {error}")
            one.stop()
            del measured.labels[name]
            return False
        print(f"{one.server.label:<26} at most {measured.differences[name]:.1e} apart")
    return True


def _start(stack: ExitStack, server: Server, work: Path, measured: Measured, starts: int) -> Running | None:
    seconds = []
    try:
        for _ in range(starts - 1 if server.name == "ours" else 0):
            tried = Running(server, work, LOGS)
            seconds.append(tried.ready_seconds)
            tried.stop()
        running = Running(server, work, LOGS)
    except RuntimeError as error:
        if server.name in OURS:
            raise
        print(f"{server.label} is left out: {error}")
        return None
    stack.callback(running.stop)
    measured.ready_seconds[server.name] = median([*seconds, running.ready_seconds])
    measured.labels[server.name], measured.settings[server.name] = server.label, server.setting
    print(f"{server.label:<26} ready after {measured.ready_seconds[server.name]:6.2f} s")
    return running


def _measure_idle(running: list[Running]) -> None:
    """All servers run all the time: one that works with nothing to do would take from the others."""
    time.sleep(1.0)
    before = [one.cpu_seconds() for one in running]
    time.sleep(IDLE_SECONDS)
    shares = [(one.cpu_seconds() - spent) / IDLE_SECONDS for one, spent in zip(running, before, strict=True)]
    print(f"idle, all servers together use {sum(shares):.3f} CPU s a second")
    for one, share in zip(running, shares, strict=True):
        if share > 0.01:
            print(f"  of these {one.server.label} {share:.3f}")


def _round(running: list[Running], wires: dict[str, Wire], measured: Measured, scale: float) -> None:
    for rows, seconds in SECONDS.items():
        for connections in CONCURRENCY:
            for one in running:
                cell = _cell(one, wires[one.server.name], rows, connections, seconds * scale)
                measured.cells.setdefault((one.server.name, rows, connections), []).append(cell)


def _cell(one: Running, wire: Wire, rows: int, connections: int, seconds: float) -> Cell:
    logged, dropped = one.log_counts()
    before = one.cpu_seconds()
    load = wire.load(one.port, rows, connections, seconds)
    used = one.cpu_seconds() - before
    logged_after, dropped_after = one.log_counts()
    if load.errors:
        print(f"{one.server.label}: {load.errors} errors, the first: {load.first_error}")
    return Cell(
        rps=load.rps,
        p50_ms=load.p50_ms,
        p99_ms=load.p99_ms,
        cpu_us=used / max(load.answered, 1) * 1e6,
        answered=load.answered,
        errors=load.errors,
        difference=0.0 if one.server.name == "empty" else wire.apart(rows, load.samples),
        generator_cpu_us=load.cpu_seconds / max(load.answered, 1) * 1e6,
        logged=logged_after - logged,
        dropped=dropped_after - dropped,
    )


if __name__ == "__main__":
    main()
