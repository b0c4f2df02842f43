from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial import training, warm
from perennial.config import Project, read_project

ROOT = Path(__file__).parents[2]


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Path]:
    """An environment with pytest and the serving code in it."""
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (site,) = made.glob("lib/python*/site-packages")
    ours = Path(pytest.__file__).parents[1]
    (site / "ours.pth").write_text(f"{ours}\n{ROOT}\n")
    yield made / "bin" / "python"
    warm.close()


def a_project(folder: Path) -> Project:
    for name, text in {
        "pyproject.toml": '[project]\nname = "small"\nversion = "1"\n'
        '[tool.perennial]\ntask = "binary"\ntarget = "y"\n',
        "src/small/__init__.py": "from pathlib import Path\nHERE = Path(__file__)\n",
        "tests/test_small.py": (
            "from pathlib import Path\nimport small\n\n"
            "def test_it_writes():\n"
            "    assert Path('data.txt').read_text() == 'as committed'\n"
            "    Path('data.txt').write_text('changed')\n"
            "    small.HERE.write_text('broken')\n"
        ),
        "data.txt": "as committed",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return read_project(folder)


def test_tests_that_write_into_their_project_change_a_copy_made_anew(python: Path, tmp_path: Path) -> None:
    folder, work = tmp_path / "checkout", tmp_path / "work"
    work.mkdir()
    project = a_project(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for _ in range(2):  # the second run sees nothing of the first
        outcome = training.run_tests(project, folder, python, work)
        assert (outcome.passed, outcome.failed) == (1, ()), outcome.tail
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
