from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from perennial import training, warm
from perennial.config import Project, read_project
from perennial.errors import ChildFailed

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


MODEL = """
import json

import numpy as np
import pandas as pd


class Model:
    def produce_model(self, data):
        self.weight = float(data["y"].mean())

    def predict(self, rows):
        return np.full(len(rows), self.weight)

    def save(self, path):
        path.write_text(json.dumps(self.weight))

    @classmethod
    def load(cls, path):
        model = cls()
        model.weight = json.loads(path.read_text())
        return model


def load_data(as_of):
    return pd.DataFrame({"x": np.arange(100.0), "y": np.arange(100) % 2})
"""


def a_trained_project(folder: Path, python: Path, work: Path) -> tuple[Project, Path, Path]:
    """A project that needs no library but pandas; its snapshot, and what training wrote."""
    a_project(folder)
    (folder / "src" / "small" / "__init__.py").write_text(MODEL)
    project = read_project(folder)
    parquet = training.load_data(project, folder, python, date(2024, 6, 1), work)
    trained, _ = training.train(project, folder, python, parquet, ("x",), None, 20, work)
    return project, parquet, trained


def test_compiling_leaves_a_plan_and_nothing_of_an_earlier_try(python: Path, tmp_path: Path) -> None:
    folder, work = tmp_path / "checkout", tmp_path / "work"
    work.mkdir()
    project, parquet, trained = a_trained_project(folder, python, work)
    (work / "serving").mkdir()
    (work / "serving" / "model.onnx").write_bytes(b"half of i")
    said: list[str] = []
    output, plan = training.compile_model(
        project, folder, python, parquet, trained, None, 20, work, said.append
    )
    assert [path.name for path in output.iterdir()] == ["plan.json"]
    assert (plan.path, plan.parity) == ("original", None)
    assert plan.reason and plan.batching_reason and said


def test_a_compiler_that_does_not_end_names_the_way_without_it(python: Path, tmp_path: Path) -> None:
    folder, work = tmp_path / "checkout", tmp_path / "work"
    work.mkdir()
    project = a_project(folder)
    limits = project.config.limits.model_copy(update={"compile_seconds": 0.01})
    hasty = project.model_copy(update={"config": project.config.model_copy(update={"limits": limits})})
    with pytest.raises(ChildFailed, match="compiling was stopped after") as stopped:
        training.compile_model(hasty, folder, python, work / "parquet", work / "trained", None, 20, work)
    assert 'or set compiled = "never" under [tool.perennial.service]' in stopped.value.next_command
