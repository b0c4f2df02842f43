"""python -m perennial: the local installation, and what is deployed where and made of what."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from perennial import installation, lineage, locking, releases
from perennial.errors import PerennialError
from perennial.journal import open_journal
from perennial.settings import settings
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
        case "approve":
            journal = open_journal(here.database)
            release = releases.find(journal, chosen.release.rpartition("-")[0], chosen.release)
            journal.approve(release, "production", chosen.reviewer)
            print(f"{release.release_id} may enter production, says {chosen.reviewer}")
        case "enable":
            journal = open_journal(here.database)
            enabled = journal.enable_project(
                chosen.name, chosen.repository, chosen.subdirectory, chosen.branch
            )
            print(f"{enabled.name} is built from {enabled.branch} of {enabled.repository}")
        case "lock":
            print(f"wrote {locking.lock(chosen.project)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perennial", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start what does not run yet")
    commands.add_parser("down", help="stop all that up started")
    commands.add_parser("status", help=f"parts, services, and what is active in {' and '.join(ENVIRONMENTS)}")
    command = commands.add_parser("lineage", help="which code, data and environment a release is made of")
    command.add_argument("release")
    command = commands.add_parser("approve", help="let a release into production, in a person's name")
    command.add_argument("release")
    command.add_argument("--reviewer", required=True)
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
