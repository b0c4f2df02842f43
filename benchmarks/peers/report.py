"""What was measured, as tables in Markdown, as figures and as a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.measure import write_figures
from benchmarks.peers.measured import Measured

# unit, target, and whether that is the most ("≤") or the least ("≥") that is wanted
TARGETS: dict[str, tuple[str, float, str]] = {
    "rps_ratio_mlflow_1row_c64": ("× MLflow", 60, "≥"),
    "rps_ratio_flask_1row_c64": ("× Flask + gunicorn", 30, "≥"),
    "rps_ratio_litserve_1row_c64": ("× LitServe", 30, "≥"),
    "rps_share_of_empty_handler_1row_c64": ("%", 40, "≥"),
    "p50_ms_1row_c1": ("ms", 0.5, "≤"),
    "p50_ratio_mlflow_1row_c1": ("× better than MLflow", 20, "≥"),
    "rps_ratio_mlflow_100rows_c1": ("× MLflow", 10, "≥"),
    "rps_ratio_flask_uncompiled_1row_c64": ("× Flask + gunicorn", 10, "≥"),
    "cpu_us_per_request": ("µs", 150, "≤"),
    "ready_seconds": ("s", 1, "≤"),
    "worker_rss_mb": ("MB", 80, "≤"),
    "max_abs_difference": ("", 1e-9, "≤"),
    "errors": ("requests", 0, "≤"),
}


def write(measured: Measured, path: Path) -> None:
    """Print the tables, write the figures. What could not be measured is absent."""
    _say_cells(measured)
    _say_servers(measured)
    _say_dropped(measured)
    print("\na bare call: " + "; ".join(_bare(measured)))
    print("\n| figure | value | target |\n|---|---|---|")
    figures: list[dict[str, Any]] = []
    for name, value in values(measured).items():
        unit, target, sense = TARGETS[name]
        if value is None or math.isnan(value):
            print(f"| `{name}` | not measured | {sense} {target} |")
            continue
        missed = value > target if sense == "≤" else value < target
        print(f"| `{name}` | {value:.4g} {unit} | {sense} {target:g}{' (missed)' if missed else ''} |")
        figures.append({"figure": name, "value": float(f"{value:.6g}"), "unit": unit, "target": target})
    write_figures(path, figures)


def values(measured: Measured) -> dict[str, float | None]:
    """The figures by their names."""
    ratio, value = measured.ratio, measured.value
    share = ratio("ours", "empty", 1, 64, "rps")
    slower = ratio("mlflow", "ours", 1, 1, "p50_ms")
    own = [name for name in ("ours", "ours_original") if name in measured.labels]
    rss = measured.rss_mb.get("ours")
    apart = [measured.every_flight, *(measured.apart(name) for name in measured.differences)]
    return {
        "rps_ratio_mlflow_1row_c64": ratio("ours", "mlflow", 1, 64, "rps"),
        "rps_ratio_flask_1row_c64": ratio("ours", "flask", 1, 64, "rps"),
        "rps_ratio_litserve_1row_c64": ratio("ours", "litserve", 1, 64, "rps"),
        "rps_share_of_empty_handler_1row_c64": None if share is None else 100 * share,
        "p50_ms_1row_c1": value("ours", 1, 1, "p50_ms"),
        "p50_ratio_mlflow_1row_c1": slower,
        "rps_ratio_mlflow_100rows_c1": ratio("ours", "mlflow", 100, 1, "rps"),
        "rps_ratio_flask_uncompiled_1row_c64": ratio("ours_original", "flask", 1, 64, "rps"),
        "cpu_us_per_request": value("ours", 1, 64, "cpu_us"),
        "ready_seconds": measured.ready_seconds.get("ours"),
        "worker_rss_mb": rss[0] if rss else None,
        "max_abs_difference": max(apart),
        "errors": sum(measured.errors(name) for name in own) if own else None,
    }


def _say_cells(measured: Measured) -> None:
    loads = sorted({key[1:] for key in measured.cells})
    for rows, connections in loads:
        print(
            f"\n{rows} row{'s' * (rows > 1)} a request, {connections} connection{'s' * (connections > 1)}\n"
        )
        print("| server | RPS | p50 ms | p99 ms | CPU µs a request | RPS of Perennial ÷ its |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, label in measured.labels.items():
            rps, p50, p99, cpu = (
                measured.value(name, rows, connections, of) or math.nan
                for of in ("rps", "p50_ms", "p99_ms", "cpu_us")
            )
            times = measured.ratio("ours", name, rows, connections, "rps")
            ratio = "" if times is None or name == "ours" else _short(times)
            print(f"| {label} | {rps:,.0f} | {_short(p50)} | {_short(p99)} | {cpu:,.0f} | {ratio} |")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _say_servers(measured: Measured) -> None:
    titles = (
        "ready s",
        "largest process MB",
        "after the load",
        "all MB",
        "processes",
        "errors",
        "difference",
    )
    print(f"\n| server | setting | {' | '.join(titles)} |\n|---|---|{'---:|' * len(titles)}")
    for name, label in measured.labels.items():
        rss = measured.rss_mb[name]
        found = (
            f"{measured.ready_seconds[name]:.2f}",
            f"{measured.first_rss_mb[name][0]:.0f}",
            f"{rss[0]:.0f}",
            f"{sum(rss):.0f}",
            f"{len(rss)}",
            f"{measured.errors(name)}",
            f"{measured.apart(name):.1e}" if name in measured.differences else "",
        )
        print(f"| {label} | {measured.settings[name]} | {' | '.join(found)} |")


def _say_dropped(measured: Measured) -> None:
    print("\nrows that the prediction log had no room for, at the speed of the load:")
    found = [(key, measured.dropped_percent(*key)) for key in measured.cells]
    for (name, rows, connections), percent in found:
        if percent:
            print(f"{measured.labels[name]}, {rows}-row requests, {connections} connections: {percent:.1f} %")
    if not any(percent for _, percent in found):
        print("none")


def _bare(measured: Measured) -> list[str]:
    return [
        f"{path} model, {rows} row{'s' * (rows != '1')}: {seconds * 1e6:,.1f} µs"
        for path, found in measured.bare.items()
        for rows, seconds in found.items()
    ]


def draw(measured: Measured, path: Path) -> None:
    """Requests a second at 64 connections and the median latency at one, of single-row requests."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = sorted(
        (name for name in measured.labels if name != "empty"),
        key=lambda name: measured.value(name, 1, 64, "rps") or 0.0,
    )
    names += [name for name in measured.labels if name == "empty"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.42 * len(names) + 1.3), sharey=True)
    colours = [
        "#1b6ca8" if name.startswith("ours") else "#d9d9d9" if name == "empty" else "#8c8c8c"
        for name in names
    ]
    panels = (
        (axes[0], "requests a second, 64 connections", 64, "rps", "{:,.0f}"),
        (axes[1], "median latency in ms, 1 connection", 1, "p50_ms", "{:.3g}"),
    )
    for axis, title, connections, of, text in panels:
        found = [measured.value(name, 1, connections, of) or math.nan for name in names]
        bars = axis.barh([measured.labels[name] for name in names], found, color=colours)
        axis.bar_label(bars, [text.format(value) for value in found], padding=3, fontsize=9)
        axis.set_xscale("log")
        low, high = min(found), max(found)
        axis.set_xlim(low / 3, high * 4)
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.text(0.995, 0.01, "log scale, one row a request", ha="right", fontsize=8, color="#666666")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
