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
from perennial.journal import Decision, Journal, Kind
from perennial.store import Store
from perennial.values import Dataset, GateReport, JsonObject, Metric, Release, Source, Verdict

_COMMITS_SHOWN = 15
_NAMES_SHOWN = 20
_WORDS_SHOWN = 300  # characters of a text of others
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)
_MARKS = {Verdict.PASS: "✓", Verdict.FAIL: "✗ fail"}


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
    kinds: tuple[Kind, ...] = ("promoted", "withdrawn", "asked")
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
        [f"## {release.release_id} for {asked.environment}?"],
        _question(asked, material),
        [f"### Gates: {'all passed' if release.gates.passed else release.gates.summary}"],
        _gates(release.gates, release.evaluation.champion),
        ["### Metrics"],
        _metrics(release, material.active),
        ["### What the test environment said"],
        _tested(release, material.tested),
        [f"### What {'would change' if material.active else 'it is made of'}"],
        _differences(release, material),
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


def _gates(gates: GateReport, champion: str | None) -> list[str]:
    # Short names, few words before the figures: the form in the Prefect UI is narrow, and its tables scroll.
    rows = [
        [
            _MARKS.get(gate.verdict, f"? {gate.verdict.value}"),
            _text(gate.name.replace(champion, "champion") if champion else gate.name),
            _number(gate.measured),
            _number(gate.threshold),
            _text(gate.reason),
        ]
        for gate in gates.gates
    ]
    return _table(["", "gate", "measured", "threshold", "reason"], rows)


def _tested(release: Release, tested: Sequence[Decision]) -> list[str]:
    if not tested:
        return ["It was **never deployed to test**."]
    last = tested[-1]
    said = [f"- **{last.kind}** on {moment(last.at)}{_because(last.payload.get('reason'))}"]
    verdicts = [decision.payload.get("verdict") or {} for decision in tested]
    # A way back, or a first release, has nothing to be compared with: that says nothing new.
    verdict: JsonObject = next((v for v in reversed(verdicts) if v.get("compared")), verdicts[-1])
    if verdict.get("compared"):
        said.append(f"- canary verdict: **{_text(verdict['verdict'])}**{_because(verdict.get('reason'))}")
    else:
        said.append(f"- canary verdict: none{_because(verdict.get('reason'))}")
    if last.kind == "promoted":
        tolerance = parity.tolerance_of(release)
        said.append(
            "- parity: its golden rows were answered as in training, "
            + (f"within {tolerance:g}" if tolerance else "bit for bit")
        )
    if release.serving is not None:
        said.append(f"- as built: {_text(release.serving.parity)}")
    measures = [row for row in verdict.get("measures", ()) if isinstance(row, dict)]
    if measures:
        rows = [[_figure(value) for value in row.values()] for row in measures]
        said += ["", *_table([_text(name) for name in measures[0]], rows)]
    return said


def _differences(release: Release, material: Material) -> list[str]:
    """What would change, against what serves now; of a first release, what it is made of."""
    active, new = material.active, _facts(release)
    if active is None:
        made_of = {"code": f"`{release.source.git_sha[:12]}`", "Python": release.environment.python, **new}
        return [f"- {name}: {fact}" for name, fact in made_of.items()]
    old = _facts(active)
    changes = [f"- **{name}**: {old[name]} → {new[name]}" for name in new if old[name] != new[name]]
    same = [f"{name} ({new[name]})" for name in new if old[name] == new[name]]
    return [
        *_code(active, release, material.commits),
        *changes,
        *_columns(active.dataset, release.dataset),
        *_environment(active, release, material.pins),
        *([f"- the same: {', '.join(same)}"] if same else []),
    ]


def _facts(release: Release) -> dict[str, str]:
    data, form = release.dataset, release.serving
    served = "compiled" if form and form.path == "compiled" else "as it was trained"
    return {
        "data": f"{data.rows:,} rows, fingerprint `{data.fingerprint[:12]}`",
        "known on": str(data.as_of),
        "time span": f"{_day(data.first_time)} … {_day(data.last_time)}",
        "served": served + (", batched" if form and form.batching else ""),
        "its own tests": f"{release.tests.passed} passed",
    }


def _code(active: Release, release: Release, commits: Sequence[str] | None) -> list[str]:
    old, new = active.source.git_sha, release.source.git_sha
    if old == new:
        return [f"- code: the same commit, `{new[:12]}`"]
    line = f"- **code**: `{old[:12]}` → `{new[:12]}`"
    if commits is None:
        return [f"{line}; what lies between could not be read from the repository"]
    if not commits:
        return [f"{line}, which **goes back**: what serves now is built on it"]
    shown = [f"    - {_text(subject)}" for subject in commits[:_COMMITS_SHOWN]]
    more = [f"    - … and {len(commits) - _COMMITS_SHOWN} more"] if len(commits) > _COMMITS_SHOWN else []
    return [f"{line}, {len(commits)} new commit{'s' * (len(commits) > 1)}", *shown, *more]


def _columns(old: Dataset, new: Dataset) -> list[str]:
    before = {column.name: column.type for column in old.columns}
    after = {column.name: column.type for column in new.columns}
    changes = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "of another type": [name for name in after if name in before and before[name] != after[name]],
    }
    said = "; ".join(f"{what} {_names(names)}" for what, names in changes.items() if names)
    return [f"- **columns**: {said}" if said else f"- columns: the same {len(after)}"]


def _environment(active: Release, release: Release, pins: Sequence[str] | None) -> list[str]:
    old, new = active.environment, release.environment
    if old.fingerprint == new.fingerprint:
        return ["- environment: the same lock"]
    said = []
    if old.lock.sha256 != new.lock.sha256:
        said.append(f"other pins: {_names(pins)}" if pins else "another lock")
    if old.serving.sha256 != new.serving.sha256:
        said.append("another version of the server")
    if old.python != new.python:
        said.append(f"Python {old.python} → {new.python}")
    return [f"- **environment**: {'; '.join(said)}"]


def _metrics(release: Release, active: Release | None) -> list[str]:
    champion = release.evaluation.champion
    differences = {m.name: m for m in release.evaluation.champion_differences if not m.slice}
    rows: list[list[str]] = []
    for metric in release.evaluation.metrics:
        if metric.slice:
            continue
        if active is not None:
            rows.append([f"{metric.name}, now", *_measured(active.evaluation.metric(metric.name))])
        rows.append([f"{metric.name}, new", *_measured(metric)])
        if metric.name in differences:
            rows.append(["better by", *_measured(differences[metric.name], sign=True)])
    notes = ["Each on its own newest days, with 95 % intervals."] if active is not None else []
    if champion is not None and differences:
        against = "what serves now" if active and champion == active.release_id else f"`{champion}`"
        notes.append(f"*Better by* is against {against}, on the same rows, with one-sided 95 % bounds.")
    elif active is not None:
        notes.append("They were never compared on the same rows.")
    return [*_table(["metric", "value", "interval"], rows), "", " ".join(notes)]


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
    return ["| " + " | ".join(line) + " |" for line in lines]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def _measured(metric: Metric | None, *, sign: bool = False) -> list[str]:
    """A metric's value and its interval."""
    if metric is None or metric.value is None:
        return ["not measured", ""]
    plus = "+" if sign else ""
    interval = (
        ""
        if metric.low is None or metric.high is None
        else (f"{metric.low:{plus}.4f} … {metric.high:{plus}.4f}")
    )
    return [f"{metric.value:{plus}.4f}", interval]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _text("" if value is None else value)


def _day(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d}" if at else "unknown"


def _because(reason: object) -> str:
    return f": {_text(reason)}" if reason else ""


def _text(words: object) -> str:
    """Words of others, as text: never as Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|]|\b_|_\b)", r"\\\1", " ".join(str(words).split())[:_WORDS_SHOWN])
