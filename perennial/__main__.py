"""python -m perennial: the local installation, and what is deployed where and made of what."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from perennial import approvals, installation, lineage, locking, releases
from perennial.errors import PerennialError
from perennial.journal import open_journal
from perennial.settings import Settings, settings
from perennial.store import open_store
from perennial.targets import open_target
from perennial.values import ENVIRONMENTS


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 1 with an explanation, never a traceback, on an error that we can explain."""
    chosen = _parser().parse_args(arguments)
    try:
        _run(chosen)
    except PerennialError as error:
        print(f"✗ {error}", file=sys.stderr)
        return 1
    return 0


def _run(chosen: argparse.Namespace) -> None:
    here = settings()
    match chosen.command:
        case "up":
            installation.up(here)
        case "down":
            installation.down(here)
        case "status":
            print(installation.status(here))
            print(lineage.overview(open_journal(here.database), here))
        case "lineage":
            print(lineage.of(open_journal(here.database), chosen.release))
        case "rollback":
            print(_roll_back(here, chosen))
        case "reap":
            print(_reap(here, dry_run=not chosen.yes))
        case "approve" | "decline":
            print(_review(here, chosen))
        case "promote" | "withdraw":
            print(_decide(here, chosen))
        case "enable":
            journal = open_journal(here.database)
            enabled = journal.enable_project(
                chosen.name, chosen.repository, chosen.subdirectory, chosen.branch
            )
            print(f"{enabled.name} is built from {enabled.branch} of {enabled.repository}")
        case "lock":
            print(f"wrote {locking.lock(chosen.project)}")


def _review(here: Settings, chosen: argparse.Namespace) -> str:
    journal = open_journal(here.database)
    release = releases.find(journal, chosen.release.rpartition("-")[0], chosen.release)
    environment = chosen.environment
    waiting = approvals.waiting(journal, release, environment)
    until = approvals.review(journal, release, environment, chosen.command, chosen.reviewer, chosen.note)
    may = f"may enter {environment} until {approvals.moment(until)}"
    if chosen.command == "decline":
        may = f"may not enter {environment}"
    lines = [f"{release.release_id} {may}, says {chosen.reviewer}"]
    for asked in waiting:
        url = f"{here.prefect_url}/runs/flow-run/{asked.run}"
        resumed = approvals.resume(here, asked, chosen.command, chosen.reviewer, chosen.note)
        lines.append(
            f"{'resumed the run that waits' if resumed else 'Next: Resume the run that waits'}: {url}"
        )
    if not waiting and chosen.command == "approve":
        parameters = f"-p environment={environment} -p release_id={release.release_id}"
        lines.append(f"Next: prefect deployment run 'deploy/{release.project}' {parameters}")
    return "\n".join(lines)


def _decide(here: Settings, chosen: argparse.Namespace) -> str:
    from perennial import verdicts  # late: what analyses rollouts imports scipy

    journal = open_journal(here.database)
    release = releases.find(journal, chosen.release.rpartition("-")[0], chosen.release)
    said = (chosen.environment, chosen.command, chosen.reviewer, chosen.note)
    return verdicts.decide(here, journal, open_target(here), release, *said)


def _roll_back(here: Settings, chosen: argparse.Namespace) -> str:
    from perennial import rollback  # late: what analyses rollouts imports scipy

    journal = open_journal(here.database)
    environment = chosen.environment or rollback.default_environment(journal, chosen.project)
    before = journal.active(chosen.project, environment)
    done = rollback.roll_back(
        here,
        journal,
        open_target(here),
        open_store(here.store, endpoint_url=here.s3_endpoint_url),
        chosen.project,
        environment,
        chosen.to,
        chosen.reason,
        rollback.service_variables(here),
    )
    instead = f" instead of {before}" if before != done.active else " still"
    return f"{done.active} serves {done.project} in {environment}{instead}: {done.url}"


def _reap(here: Settings, *, dry_run: bool) -> str:
    from perennial import reaper

    found = reaper.reap(here, open_journal(here.database), open_target(here), dry_run=dry_run)
    if not found:
        return "nothing is there that nothing needs"
    size = sum(one.bytes for one in found) / 2**20
    end = f"{len(found)} things, {size:,.0f} MiB"
    lines = _columns(reaper.table(found))
    return "\n".join(
        [*lines, f"{end}\nNext: python -m perennial reap --yes" if dry_run else f"removed {end}"]
    )


def _columns(rows: list[dict[str, str]]) -> list[str]:
    cells = [tuple(rows[0]), *(tuple(row.values()) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perennial", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start what does not run yet")
    commands.add_parser("down", help="stop all that up started")
    commands.add_parser("status", help=f"parts, services, and what is active in {' and '.join(ENVIRONMENTS)}")
    command = commands.add_parser("lineage", help="which code, data and environment a release is made of")
    command.add_argument("release")
    command = commands.add_parser("rollback", help="bring a release back that served before, at once")
    command.add_argument("project")
    command.add_argument("--environment", choices=ENVIRONMENTS, help="without: where users are")
    command.add_argument("--to", metavar="RELEASE", help="without: the one before the one that serves")
    command.add_argument("--reason", default="", help="for the journal")
    command = commands.add_parser("reap", help="list what nothing needs any more; with --yes, remove it")
    command.add_argument("--yes", action="store_true")
    for verb, means in (("approve", "let a release in"), ("decline", "keep a release out")):
        command = commands.add_parser(verb, help=f"{means}, in a person's name; a run that waits goes on")
        command.add_argument("release")
        command.add_argument("--reviewer", required=True)
        command.add_argument("--note", default="")
        command.add_argument("--environment", choices=ENVIRONMENTS, default="production")
    for verb, means in (("promote", "give all traffic to"), ("withdraw", "remove")):
        command = commands.add_parser(verb, help=f"{means} a candidate for which the evidence is too little")
        command.add_argument("release")
        command.add_argument("--reviewer", required=True)
        command.add_argument("--note", default="")
        command.add_argument("--environment", choices=ENVIRONMENTS, default="production")
    command = commands.add_parser("enable", help="build a project from a git repository, or from another one")
    command.add_argument("name")
    command.add_argument("repository", help="a path or URL that git reads with no password in it")
    command.add_argument("--subdirectory", default="")
    command.add_argument("--branch", default="main")
    command = commands.add_parser("lock", help="write requirements.lock of a project's folder")
    command.add_argument("project", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
