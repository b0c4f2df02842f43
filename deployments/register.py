"""Register what prefect.yaml declares, and the projects it is for."""

from __future__ import annotations

import sys

from perennial import process
from perennial.errors import ChildFailed, InstallationError, PerennialError
from perennial.installation import REPOSITORY, prefect_environment, require_running
from perennial.settings import settings

_TIMEOUT_SECONDS = 180.0


def register() -> None:
    """Create or update every deployment of prefect.yaml on the running Prefect server. May be repeated."""
    here = settings()
    require_running(here)
    environment = process.scrubbed_environment(
        PERENNIAL_REPOSITORY=str(REPOSITORY), PERENNIAL_PYTHON=sys.executable, **prefect_environment(here)
    )
    try:
        process.capture(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=REPOSITORY,
            environment=environment,
            timeout_seconds=_TIMEOUT_SECONDS,
        )
    except ChildFailed as error:
        raise InstallationError(
            f"prefect.yaml could not be registered: {error.found}",
            "a prefect.yaml that `prefect deploy --all` takes",
        ) from error


def main() -> None:
    """Register, or say in a few lines why not."""
    try:
        register()
    except PerennialError as error:
        sys.exit(f"✗ {error}")


if __name__ == "__main__":
    main()
