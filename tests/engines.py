"""A Docker engine for tests, and the test service as an image in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perennial import engine, image_context, images
from perennial.errors import InstallationError
from tests.installations import SERVICE

_DOCKERFILE = """
ARG BASE
FROM ${BASE}
COPY service.py /service.py
USER 65532:65532
"""


@contextlib.contextmanager
def engine_or_skip() -> Iterator[Any]:
    """The engine that DOCKER_HOST names; without one the test is skipped, and in CI fails."""
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(engine.open_engine())
        except InstallationError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"{error.found}. {error.next_command}")
        yield opened


def service_image(opened: Any, work: Path) -> str:
    """The id of an image of the test service on the local base, which is made once."""
    base = images.local_base(opened, work)
    with image_context.create() as (context, file):
        context.add_text("Dockerfile", _DOCKERFILE)
        context.add_text("service.py", SERVICE.read_text())
        return str(engine.build(opened, context, file, "perennial/test-service", {"BASE": base}, {}).id)
