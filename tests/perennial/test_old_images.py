"""In a real engine, images that nothing needs go; those that a container or a release needs stay."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from perennial import engine, image_context, images, old_images, reaper
from perennial.journal import open_journal
from perennial.targets import open_target
from tests.engines import engine_or_skip
from tests.installations import own_settings
from tests.releases import a_release


class Engine:
    """An engine with tiny images, of a project that nobody else has."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened
        self.project = f"p{uuid4().hex[:8]}"
        self.made: list[str] = []

    def release_id(self, letter: str) -> str:
        return f"{self.project}-{letter * 12}"

    def runtime(self, name: str) -> str:
        return self.build(f"perennial/runtime:{self.project}-{name}", "scratch", {})

    def release(self, letter: str, runtime: str) -> str:
        release_id = self.release_id(letter)
        labels = {"org.opencontainers.image.version": release_id}
        return self.build(images.name(self.project, release_id), runtime, labels)

    def build(self, reference: str, base: str, labels: dict[str, str]) -> str:
        with image_context.create() as (context, file):
            context.add_text("Dockerfile", f'FROM {base}\nCOPY it /{uuid4().hex}\nCMD ["/it"]\n')
            context.add_text("it", reference)
            engine.build(self.opened, context, file, reference, {}, labels)
        self.made.append(reference)
        return reference

    def left(self) -> set[str]:
        """The last part of the names of our images."""
        return {name.rpartition("-")[2] for name in self.made if engine.find_image(self.opened, name)}


@pytest.fixture
def docker() -> Iterator[Engine]:
    with engine_or_skip() as opened:
        ours = Engine(opened)
        yield ours
        for name in reversed(ours.made):
            with engine.tolerating(engine.NOT_FOUND):
                opened.api.remove_image(name, force=True)


def test_images_of_old_releases_go_and_with_the_last_one_the_runtime_below_them(
    docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = own_settings(tmp_path / "home", target="docker")
    journal, target = open_journal(here.database), open_target(here)
    journal.enable_project(docker.project, "/repository")
    for number, letter in enumerate("abcdef"):
        created = datetime(2024, 6, 1 + number, tzinfo=UTC)
        release_id = docker.release_id(letter)
        journal.record_release(a_release(release_id=release_id, project=docker.project, created_at=created))
    below, apart = docker.runtime("below"), docker.runtime("apart")
    for letter in "abf":
        docker.release(letter, below)
    docker.release("c", apart)
    docker.release("0", apart)  # of another installation with the same engine
    asked_for = here.root / "releases" / docker.release_id("b")
    asked_for.mkdir(parents=True)
    container = docker.opened.api.create_container(
        images.name(docker.project, docker.release_id("c")), ["/it"]
    )

    def reap(*, dry_run: bool) -> set[str]:
        found = reaper.reap(here, journal, target, dry_run=dry_run)
        return {one.name.rpartition("-")[2] for one in found if docker.project in one.name}

    try:
        assert reap(dry_run=True) == {"a" * 12}
        assert reap(dry_run=False) == {"a" * 12}
        everything = {letter * 12 for letter in "bcf0"} | {"below", "apart"}
        assert docker.left() == everything, "in use by a container, asked for, new, and unknown here"
    finally:
        docker.opened.api.remove_container(container["Id"])
    os.utime(asked_for, times=(time.time() - 2 * 86_400,) * 2)
    assert reap(dry_run=False) == {"b" * 12, "c" * 12}
    assert docker.left() == everything - {"b" * 12, "c" * 12}

    # No release stands on a runtime any more once the last one is gone.
    docker.opened.api.remove_image(images.name(docker.project, docker.release_id("0")))
    assert reap(dry_run=False) == set(), "a runtime that was just made waits for its release"
    monkeypatch.setattr(old_images, "_KEEP_RUNTIME_SECONDS", 0.0)
    assert reap(dry_run=True) == {"apart"}
