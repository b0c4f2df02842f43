from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial import process, warm
from perennial.errors import ChildFailed

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    warm.close()


def run(folder: Path, code: str, *, name: str = "job", **options: object) -> tuple[int, list[str]]:
    """Run `code` as a module by the warm process; (exit code, lines)."""
    (folder / f"{name}.py").write_text(code)
    lines: list[str] = []
    arguments = {"timeout_seconds": 20.0, "what": "the job", **options}
    # The checkout stands in for the serving wheel of a model's environment.
    environment = process.scrubbed_environment(PYTHONHASHSEED="7", PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")
    code_ = process.run(
        [sys.executable, "-m", name, "one", "two"],
        cwd=ROOT,
        environment=environment,
        log=folder / "log",
        on_line=lines.append,
        spawn=warm.spawn,
        **arguments,  # type: ignore[arg-type]
    )
    return code_, lines


def test_a_module_runs_as_python_dash_m_would(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "print(__name__, sys.argv[1:], os.getcwd())\n"
        "print('err', file=sys.stderr)\n"
        "print(os.environ['PYTHONHASHSEED'], sys.stdin.read() == '')\n"
    )
    returned, lines = run(tmp_path, code)
    assert returned == 0
    assert lines[0] == f"__main__ ['one', 'two'] {ROOT}"
    assert set(lines[1:]) == {"err", "7 True"}


@pytest.mark.parametrize(("code", "expected"), [("import sys; sys.exit(3)", 3), ("", 0)])
def test_its_exit_code_is_returned(tmp_path: Path, code: str, expected: int) -> None:
    assert run(tmp_path, code, allowed_codes=(0, 3))[0] == expected


def test_a_traceback_and_a_killing_signal_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match=r"exit code 1(?s:.*)ValueError: no"):
        run(tmp_path, "raise ValueError('no')")
    with pytest.raises(ChildFailed, match="killed by SIGKILL"):
        run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert run(tmp_path, "print('and on')")[1] == ["and on"]


def test_children_share_nothing_but_libraries(tmp_path: Path) -> None:
    code = (
        "import sys, job2\n"
        "print(getattr(sys, 'left_behind', 'clean'), job2.VALUE)\n"
        "sys.left_behind = 'dirty'\n"
    )
    (tmp_path / "job2.py").write_text("VALUE = 1\n")
    assert run(tmp_path, code)[1] == ["clean 1"]
    (tmp_path / "job2.py").write_text("VALUE = 22\n")
    assert run(tmp_path, code)[1] == ["clean 22"]


def test_children_do_not_draw_the_same_random_numbers(tmp_path: Path) -> None:
    code = "import numpy, random\nprint(numpy.random.random(), random.random())\n"
    assert run(tmp_path, code)[1] != run(tmp_path, code)[1]


def test_a_hanging_child_is_killed_with_its_descendants_and_the_next_one_runs(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "hang.py").write_text(code)
    heard: list[str] = []
    with pytest.raises(ChildFailed, match="stopped after"):
        process.run(
            [sys.executable, "-m", "hang"], cwd=ROOT, timeout_seconds=3, log=tmp_path / "log", what="it",
            environment=process.scrubbed_environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
            on_line=heard.append, spawn=warm.spawn,
        )  # fmt: skip
    assert _gone(int(heard[0]))
    assert run(tmp_path, "print('and on')")[1] == ["and on"]


@pytest.mark.parametrize("victim", ["starter", "server"])
def test_when_starter_or_server_is_killed_no_child_is_left(tmp_path: Path, victim: str) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nprint(os.getppid(), os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    starter = (
        "import sys\nfrom pathlib import Path\nfrom perennial import process, warm\n"
        f"process.run([sys.executable, '-m', 'sleeper'], cwd=Path({str(ROOT)!r}), timeout_seconds=60,\n"
        f"  environment=process.scrubbed_environment(PYTHONPATH={f'{tmp_path}{os.pathsep}{ROOT}'!r}),\n"
        f"  log=Path({str(tmp_path / 'log')!r}), what='x', spawn=warm.spawn,\n"
        "  on_line=lambda line: print(line, flush=True))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", starter], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stderr is not None
    server, child = map(int, started.stdout.readline().split())
    os.kill(started.pid if victim == "starter" else server, signal.SIGKILL)
    _, errors = started.communicate(timeout=20)
    if victim == "server":
        assert "killed by SIGKILL" in errors
    assert _gone(child) and _gone(server)


def test_what_one_child_imported_is_imported_beforehand_for_the_next_server(tmp_path: Path) -> None:
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (site,) = made.glob("lib/python*/site-packages")
    ours = Path(sys.modules["msgspec"].__file__ or "").parents[1]
    (site / "ours.pth").write_text(f"{ours}\n{ROOT}\n")
    (tmp_path / "job.py").write_text("import sys\nprint('pandas' in sys.modules)\nimport pandas\n")
    seen = []
    for _ in range(2):
        process.run(
            [str(made / "bin" / "python"), "-m", "job"], cwd=tmp_path, timeout_seconds=60, what="it",
            environment=process.scrubbed_environment(), log=tmp_path / "log", on_line=seen.append,
            spawn=warm.spawn,
        )  # fmt: skip
        warm.close()
    assert seen == ["False", "True"]


def _gone(pid: int) -> bool:
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or " Z " in stat.read_text():
            return True
        time.sleep(0.05)
    return False


def test_who_left_the_group_and_holds_the_output_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "code = 'import time; time.sleep(30)'\n"
        "p = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
        "print(p.pid)\n"
    )
    run(tmp_path, "")
    began = time.monotonic()
    returned, lines = run(tmp_path, code, name="leaver")
    assert returned == 0
    assert time.monotonic() - began < 5
    os.kill(int(lines[0]), signal.SIGKILL)
    assert run(tmp_path, "print('and on')", name="after")[1] == ["and on"]
