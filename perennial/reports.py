"""Pages that a person reads: what the data, the tests, the evaluation, the gates and the compiler said."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from perennial.evaluation import Floats, Holdout
from perennial.validation import DataReport
from perennial.values import Evaluation, GateReport, Metric, ServingForm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = ("roc", "calibration", "predicted", "slices")
_SLICES_SHOWN = 16
_BINS = 10
_INK, _FAINT = "#1f4e79", "#b7c9db"


def gate_table(gates: GateReport) -> list[dict[str, Any]]:
    """One row per gate, in the order they were decided."""
    return [
        {
            "gate": gate.name,
            "verdict": gate.verdict.value,
            "measured": _number(gate.measured),
            "threshold": _number(gate.threshold),
            "interval": f"{gate.interval[0]:.4f} … {gate.interval[1]:.4f}" if gate.interval else "",
            "reason": gate.reason,
        }
        for gate in gates.gates
    ]


def data_page(report: DataReport, dataset_line: str) -> str:
    """Markdown: every expectation with what was found, the failures first."""
    checks = sorted(report.checks, key=lambda check: check.passed)
    verdict = (
        f"**{len(report.failures)} of {len(checks)} checks failed**" if report.failures else "**passed**"
    )
    rows = [
        f"| {'✓' if c.passed else '✗'} | {c.column or 'table'} | {_cell(c.expectation)} | {_cell(c.found)} |"
        for c in checks
    ]
    head = ["| | column | expectation | found |", "|---|---|---|---|"]
    return "\n".join([f"# Data validation: {verdict}", "", dataset_line, "", *head, *rows])


def tests_page(passed: int, failed: Sequence[str], skipped: int, tail: str) -> str:
    """Markdown: what the developer's tests said, and the end of pytest's output."""
    title = f"# Tests: {len(failed)} failed" if failed else f"# Tests: {passed} passed"
    names = [f"- ✗ `{name}`" for name in failed]
    return "\n".join(
        [
            title,
            "",
            f"{passed} passed, {len(failed)} failed, {skipped} skipped",
            *names,
            "",
            "```",
            tail,
            "```",
        ]
    )


def serving_page(form: ServingForm) -> str:
    """Markdown: how the release is served, why, and how far that is from the model as it was trained."""
    title = "compiled" if form.path == "compiled" else "by the model as it was trained"
    batching = "may" if form.batching else "may not"
    return "\n".join(
        [
            f"# Served {title}",
            "",
            f"Why: {form.reason}",
            "",
            f"Parity: {form.parity}",
            "",
            f"Requests that wait {batching} be predicted together: {form.batching_reason}",
        ]
    )


def evaluation_page(
    evaluation: Evaluation, gates: GateReport, images: Mapping[str, str], links: Mapping[str, str]
) -> str:
    """Markdown: metrics with intervals, the paired differences to the champion, plots, links."""
    overall = [m for m in evaluation.metrics if not m.slice]
    lines = ["# Evaluation on the newest days", ""]
    if links:
        lines += [" · ".join(f"[{label}]({url})" for label, url in links.items()), ""]
    lines += ["| metric | value | 95 % interval (by day) | rows | days |", "|---|---|---|---|---|"]
    lines += [
        f"| {m.name} | {_number(m.value)} | {_interval(m)} | {m.rows:,} | {m.clusters} |" for m in overall
    ]
    if evaluation.champion:
        lines += ["", f"## Against the champion `{evaluation.champion}`, on the same rows", ""]
        lines += [
            "| metric | difference (more is better) | 90 % interval: one-sided 95 % bounds |",
            "|---|---|---|",
        ]
        lines += [
            f"| {m.name} | {_number(m.value, sign=True)} | {_interval(m)} |"
            for m in evaluation.champion_differences
        ]
    lines += ["", f"## Gates: {gates.summary}"]
    lines += [line for name, url in images.items() for line in ("", f"![{name}]({url})")]
    slices = [m for m in evaluation.metrics if m.slice]
    if slices:
        lines += [
            "",
            "## Per slice",
            "",
            "| slice | metric | value | 95 % interval | rows |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {_cell(m.slice)} | {m.name} | {_number(m.value)} | {_interval(m)} | {m.rows:,} |"
            for m in slices
        ]
    return "\n".join(lines)


def evaluation_html(title: str, metrics: Sequence[Metric], plots: Mapping[str, bytes]) -> str:
    """A page that stands alone: the metrics and the plots, with nothing to load from elsewhere."""
    rows = "".join(
        f"<tr><td>{html.escape(m.slice or 'all')}<td>{m.name}<td>{_number(m.value)}"
        f"<td>{_interval(m)}<td>{m.rows:,}"
        for m in metrics
    )
    images = "".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in plots.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:15px system-ui;margin:2rem auto;max-width:70rem}img{max-width:100%}"
        "td,th{padding:.2rem .8rem;text-align:left}</style>"
        f"<h1>{html.escape(title)}</h1>{images}"
        f"<table><tr><th>slice<th>metric<th>value<th>95 % interval<th>rows{rows}</table>"
    )


def plots(holdout: Holdout, evaluation: Evaluation, task: str) -> dict[str, bytes]:
    """PNG by name: discrimination and calibration (or predicted against actual), and bars per slice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawings = (
        {"roc": _draw_roc, "calibration": _draw_calibration}
        if task == "binary"
        else {"predicted": _draw_predicted}
    )
    done: dict[str, bytes] = {}
    for name, draw in drawings.items():
        figure = Figure(figsize=(4.6, 4.2), layout="tight")
        draw(figure.subplots(), holdout.truth, holdout.prediction)
        done[name] = _png(FigureCanvasAgg(figure))
    slices = [
        m
        for m in evaluation.metrics
        if m.slice and m.name == evaluation.metrics[0].name and m.value is not None
    ]
    if slices:
        shown = sorted(slices, key=lambda m: -m.rows)[:_SLICES_SHOWN]
        figure = Figure(figsize=(7.2, 1.2 + 0.28 * len(shown)), layout="tight")
        _draw_slices(figure.subplots(), shown, evaluation.metrics[0])
        done["slices"] = _png(FigureCanvasAgg(figure))
    return done


def _draw_roc(axes: Axes, truth: Floats, prediction: Floats) -> None:
    order = np.argsort(-prediction, kind="stable")
    hits = truth[order] == 1
    distinct = np.append(np.diff(prediction[order]) != 0, True)  # one point per threshold, not per row
    true_rate = np.cumsum(hits)[distinct] / max(1, hits.sum())
    false_rate = np.cumsum(~hits)[distinct] / max(1, (~hits).sum())
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1)
    axes.plot(np.append(0, false_rate), np.append(0, true_rate), color=_INK)
    axes.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")


def _draw_calibration(axes: Axes, truth: Floats, prediction: Floats) -> None:
    edges = np.quantile(prediction, np.linspace(0, 1, _BINS + 1))
    bins = np.clip(np.searchsorted(edges, prediction, side="right") - 1, 0, _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    seen = counts > 0
    predicted = np.bincount(bins, weights=prediction, minlength=_BINS)[seen] / counts[seen]
    actual = np.bincount(bins, weights=truth, minlength=_BINS)[seen] / counts[seen]
    top = float(max(predicted.max(), actual.max())) * 1.05
    axes.plot([0, top], [0, top], color=_FAINT, linewidth=1)
    axes.plot(predicted, actual, "o-", color=_INK)
    axes.set(title="Calibration (tenths of the predictions)", xlabel="predicted", ylabel="observed")


def _draw_predicted(axes: Axes, truth: Floats, prediction: Floats) -> None:
    sample = np.random.default_rng(0).permutation(len(truth))[:2000]
    axes.plot(prediction[sample], truth[sample], ".", color=_INK, alpha=0.3)
    axes.set(title="Predicted against actual", xlabel="predicted", ylabel="actual")


def _draw_slices(axes: Axes, shown: Sequence[Metric], overall: Metric) -> None:
    values = [m.value or 0.0 for m in shown]
    errors = [
        [v - (m.low if m.low is not None else v) for v, m in zip(values, shown, strict=True)],
        [(m.high if m.high is not None else v) - v for v, m in zip(values, shown, strict=True)],
    ]
    axes.barh([m.slice for m in shown], values, xerr=np.clip(errors, 0, None), color=_FAINT, ecolor=_INK)
    if overall.value is not None:
        axes.axvline(overall.value, color=_INK, linewidth=1)
    bounds = [m.low for m in shown if m.low is not None]
    if bounds:
        axes.set_xlim(left=max(0.0, min(bounds) - 0.05))
    axes.invert_yaxis()
    axes.set(title=f"{overall.name} per slice (line: all rows)")


def _png(canvas: Any) -> bytes:
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "not measured"
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def _interval(metric: Metric) -> str:
    return "none" if metric.low is None or metric.high is None else f"{metric.low:.4f} … {metric.high:.4f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
