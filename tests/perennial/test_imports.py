from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.imports import deferred


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `heavy_library` whose import leaves a mark, and one that imports it."""
    mark = tmp_path / "ran"
    (tmp_path / "heavy_library.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nANSWER = 42\n"
    )
    (tmp_path / "library_user.py").write_text(
        "import heavy_library\n\n\ndef answer():\n    return heavy_library.ANSWER\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    for name in ("heavy_library", "library_user"):
        sys.modules.pop(name, None)


def test_a_deferred_module_runs_at_its_first_use_and_not_before(library: Path) -> None:
    with deferred("heavy_library"):
        import library_user  # type: ignore[import-not-found]
    assert not library.exists()
    assert library_user.answer() == 42
    assert library.exists()


def test_a_module_that_is_not_named_runs_at_once(library: Path) -> None:
    with deferred("another_library"):
        import library_user  # type: ignore[import-not-found]  # noqa: F401
    assert library.exists()


def test_afterwards_imports_are_as_before(library: Path) -> None:
    finders = list(sys.meta_path)
    with deferred("heavy_library"):
        assert sys.meta_path != finders
    assert sys.meta_path == finders
    import library_user  # type: ignore[import-not-found]  # noqa: F401

    assert library.exists()


def test_a_deferred_module_that_does_not_exist_is_missing_at_once() -> None:
    with deferred("no_such_library"), pytest.raises(ModuleNotFoundError):
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401
