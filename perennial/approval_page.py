"""The page a person reads before a release enters an environment: what was measured, what would change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from perennial import parity, source
from perennial.approvals import Request, moment
from perennial.errors import PerennialError
from perennial.journal import Decision, Journal
from perennial.store import Store
from perennial.values import Dataset, GateReport, Metric, Release, Source, Verdict

_COMMITS_SHOWN = 15
_NAMES_SHOWN = 20
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)
_MARKS = {Verdict.PASS: "✓ pass", Verdict.FAIL: "✗ fail"}


class Material(NamedTuple):
    """What the page is made of besides the release. None: it could not be read."""

    active: Release | None  # what serves now
    tested: Sequence[Decision]  # what became of the release in the test environment
    commits: Sequence[str] | None  # between the two releases, newest first
    pins: Sequence[str] | None  # that differ between the two locks


def gather(journal: Journal, store: Store, release: Release, asked: Request) -> Material:
    """All that the page says, read now. What cannot be read is left out: it must not stop the question."""
    active_id = journal.active(asked.project, asked.environment)
    active = journal.release(active_id) if active_id else None
    kinds = ("promoted", "withdrawn", "asked")
    tested = [
        decision
        for decision in journal.decisions(asked.project, "test", kinds)
        if decision.release_id == release.release_id
    ]
    if active is None or active.release_id == release.release_id:
        return Material(active, tested, None, None)
    return Material(active, tested, _commits(active.source, release.source), _pins(store, active, release))


def page(asked: Request, release: Release, material: Material) -> str:
    """Markdown."""
    sections = [
        [f"# {release.release_id} for {asked.environment}?"],
        _question(asked, material),
        [f"## Gates: {release.gates.summary if not release.gates.passed else 'all passed'}"],
        _gates(release.gates),
        ["## What the test environment said"],
        _tested(release, material.tested),
        *_differences(asked, release, material),
        ["## Metrics"],
        _metrics(release, material.active),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _question(asked: Request, material: Material) -> list[str]:
    serving = (
        f"`{material.active.release_id}` serves there now."
        if material.active
        else ("Nothing serves there yet: this would be the first release.")
    )
    return [
        f"{serving} Open until **{moment(asked.expires_at)}**. "
        f"An approval is for digest `{asked.release_digest[:16]}…` alone: of anything else it says nothing."
    ]


def _gates(gates: GateReport) -> list[str]:
    rows = [
        [
            _MARKS.get(gate.verdict, f"? {gate.verdict.value}"),
            gate.name,
            _number(gate.measured),
            _number(gate.threshold),
            gate.reason,
        ]
        for gate in gates.gates
    ]
    return _table(["verdict", "gate", "measured", "threshold", "reason"], rows)


def _tested(release: Release, tested: Sequence[Decision]) -> list[str]:
    if not tested:
        return ["It was **never deployed to test**."]
    last = tested[-1]
    said = [f"- **{last.kind}** on {moment(last.at)}" + _because(last.payload.get("reason"))]
    verdict = last.payload.get("verdict")
    if isinstance(verdict, dict) and verdict.get("verdict"):
        said.append(f"- canary verdict: **{_text(verdict['verdict'])}**{_because(verdict.get('reason'))}")
    if last.kind == "promoted":
        tolerance = parity.tolerance_of(release)
        said.append(
            "- parity: its golden rows were answered as in training, "
            + (f"within {tolerance:g}" if tolerance else "bit for bit")
        )
    if release.serving is not None:
        said.append(f"- as built: {_text(release.serving.parity)}")
    return said


def _differences(asked: Request, release: Release, material: Material) -> list[list[str]]:
    """What would change, against what serves now; alone, what comes first."""
    active = material.active
    if active is None:
        rows = [[name, new] for name, new in _facts(release).items()]
        return [["## What it is made of"], _table(["", release.release_id], rows)]
    now, new = _facts(active), _facts(release)
    rows = [[_differs(now[name], new[name], name), now[name], new[name]] for name in new]
    sections = [["## What would change"], _table(["", f"now: {active.release_id}", release.release_id], rows)]
    notes = _code_notes(active, release, material.commits)
    notes += _column_notes(active.dataset, release.dataset)
    notes += _lock_notes(active, release, material.pins)
    return [*sections, notes]


def _facts(release: Release) -> dict[str, str]:
    data, form = release.dataset, release.serving
    return {
        "code": f"`{release.source.git_sha[:12]}`",
        "data": f"{data.rows:,} rows, fingerprint `{data.fingerprint[:12]}`",
        "known on": str(data.as_of),
        "time span": f"{_day(data.first_time)} … {_day(data.last_time)}",
        "columns": str(len(data.columns)),
        "environment": f"lock `{release.environment.fingerprint[:12]}`, Python {release.environment.python}",
        "served": ("compiled" if form and form.path == "compiled" else "as it was trained")
        + (", batched" if form and form.batching else ""),
        "tests": f"{release.tests.passed} passed",
    }


def _differs(now: str, new: str, name: str) -> str:
    return name if now == new else f"**{name}**"


def _code_notes(active: Release, release: Release, commits: Sequence[str] | None) -> list[str]:
    if active.source.git_sha == release.source.git_sha:
        return ["- code: the same commit"]
    if commits is None:
        return ["- code: another commit; what lies between could not be read from the repository"]
    if not commits:
        return ["- code: **goes back** to a commit that what serves now is built on"]
    shown = [f"    - {_text(subject)}" for subject in commits[:_COMMITS_SHOWN]]
    more = [f"    - … and {len(commits) - _COMMITS_SHOWN} more"] if len(commits) > _COMMITS_SHOWN else []
    return [f"- code: {len(commits)} new commit{'s' * (len(commits) > 1)}", *shown, *more]


def _column_notes(old: Dataset, new: Dataset) -> list[str]:
    before = {column.name: column.type for column in old.columns}
    after = {column.name: column.type for column in new.columns}
    changes = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "of another type": [name for name in after if name in before and before[name] != after[name]],
    }
    said = "; ".join(f"**{what}** {_names(names)}" for what, names in changes.items() if names)
    rows = new.rows - old.rows
    return [f"- data: {rows:+,} rows; columns " + (said or "are the same")]


def _lock_notes(active: Release, release: Release, pins: Sequence[str] | None) -> list[str]:
    old, new = active.environment, release.environment
    if old.fingerprint == new.fingerprint:
        return ["- environment: the same lock"]
    said = []
    if old.lock.sha256 != new.lock.sha256:
        said.append(f"other pins: {_names(pins)}" if pins else "another lock")
    if old.serving.sha256 != new.serving.sha256:
        said.append("another version of the server")
    return [f"- environment: {'; '.join(said) or 'another Python'}"]


def _metrics(release: Release, active: Release | None) -> list[str]:
    overall = [metric for metric in release.evaluation.metrics if not metric.slice]
    if active is None:
        rows = [[m.name, _interval(m), f"{m.rows:,}", str(m.clusters)] for m in overall]
        return _table(["metric", "value, 95 % interval", "rows", "days"], rows)
    evaluation = release.evaluation
    paired = evaluation.champion == active.release_id
    differences = {m.name: m for m in evaluation.champion_differences if paired and not m.slice}
    rows = [
        [
            metric.name,
            _interval(active.evaluation.metric(metric.name)),
            _interval(metric),
            _interval(differences.get(metric.name), sign=True),
        ]
        for metric in overall
    ]
    head = ["metric", "now", "new", "difference on the same rows (more is better)"]
    why = (
        ""
        if paired
        else f", and it was compared with {f'`{evaluation.champion}`' if evaluation.champion else 'nothing'}"
    )
    return [*_table(head, rows), "", f"Each in its own newest days, with 95 % intervals{why}."]


def _commits(old: Source, new: Source) -> list[str] | None:
    with suppress(PerennialError, OSError):
        return source.subjects(old, new)
    return None


def _pins(store: Store, old: Release, new: Release) -> list[str] | None:
    """`name 1.0 → 1.1` of each pin that differs between the two locks."""
    if old.environment.lock.sha256 == new.environment.lock.sha256:
        return []
    try:
        before, after = (
            dict(_PIN.findall(store.get(store.key(release.environment.lock.uri)).decode(errors="replace")))
            for release in (old, new)
        )
    except (PerennialError, OSError):
        return None
    return [
        f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def _interval(metric: Metric | None, *, sign: bool = False) -> str:
    if metric is None or metric.value is None:
        return "not measured"
    value = f"{metric.value:+.4f}" if sign else f"{metric.value:.4f}"
    if metric.low is None or metric.high is None:
        return value
    return (
        f"{value} ({metric.low:+.4f} … {metric.high:+.4f})"
        if sign
        else (f"{value} ({metric.low:.4f} … {metric.high:.4f})")
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _day(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d}" if at else "unknown"


def _because(reason: object) -> str:
    return f": {_text(reason)}" if reason else ""


def _text(words: object) -> str:
    """Words of others, as text: never as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(str(words).split()))[:300]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
