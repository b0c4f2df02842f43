from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from perennial import process
from perennial.errors import ChildFailed


def run(folder: Path, code: str, **options: object) -> int:
    arguments = {"timeout_seconds": 20.0, "what": "the child", **options}
    return process.run(
        [sys.executable, "-c", code],
        cwd=folder,
        environment=process.scrubbed_environment(),
        log=folder / "child.log",
        **arguments,  # type: ignore[arg-type]
    )


def test_output_goes_to_the_log_and_to_the_listener(tmp_path: Path) -> None:
    heard: list[str] = []
    assert run(tmp_path, "print('one'); import sys; print('two', file=sys.stderr)", on_line=heard.append) == 0
    assert sorted(heard) == ["one", "two"]
    assert "one\n" in (tmp_path / "child.log").read_text()


def test_environment_is_scrubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERENNIAL_DATABASE_URL", "PREFECT_API_AUTH_STRING", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hush")
    heard: list[str] = []
    run(tmp_path, "import os; print([n for n, v in os.environ.items() if v == 'hush'])", on_line=heard.append)
    assert heard == ["[]"]


def test_a_child_that_fails_is_shown_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match=r"ended with an error, exit code 1(?s:.*)ValueError: no such"):
        run(tmp_path, "raise ValueError('no such luck')")


def test_a_hanging_child_is_killed_with_all_its_descendants(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    heard: list[str] = []
    began = time.monotonic()
    with pytest.raises(ChildFailed, match="stopped after") as error:
        run(tmp_path, code, timeout_seconds=1.5, on_line=heard.append)
    assert time.monotonic() - began < 15
    assert "within 2 s" in str(error.value)
    assert _gone(int(heard[0]))


def test_a_killed_child_is_called_killed(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="killed by SIGKILL"):
        run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = (
        "import sys\nfrom pathlib import Path\nfrom perennial import process\n"
        "code = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "process.run([sys.executable, '-c', code],\n"
        f"  cwd=Path('.'), environment=process.scrubbed_environment(), timeout_seconds=60,\n"
        f"  log=Path({str(tmp_path / 'log')!r}), what='x', on_line=lambda line: print(line, flush=True))"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    child = int(started.stdout.readline())
    started.send_signal(signal.SIGKILL)
    started.wait()
    started.stdout.close()
    assert _gone(child)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="no-such-program"):
        process.capture(["no-such-program"], cwd=tmp_path, environment={}, timeout_seconds=5)


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


ESCAPED = (
    "import subprocess, sys, time\n"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'], start_new_session=True)\n"
    "print(p.pid, flush=True)\n"
)


def test_who_left_the_group_and_holds_the_output_is_not_waited_for(tmp_path: Path) -> None:
    heard: list[str] = []
    began = time.monotonic()
    assert run(tmp_path, ESCAPED + "print('the last', end='')", on_line=heard.append) == 0
    assert time.monotonic() - began < 5
    assert heard[1:] == ["the last"]
    os.kill(int(heard[0]), signal.SIGKILL)


def test_the_limit_holds_though_somebody_else_holds_the_output(tmp_path: Path) -> None:
    heard: list[str] = []
    began = time.monotonic()
    with pytest.raises(ChildFailed, match="stopped after"):
        run(tmp_path, ESCAPED + "time.sleep(60)", timeout_seconds=1.5, on_line=heard.append)
    assert time.monotonic() - began < 6
    os.kill(int(heard[0]), signal.SIGKILL)


def test_who_stayed_in_the_group_ends_with_the_child(tmp_path: Path) -> None:
    heard: list[str] = []
    began = time.monotonic()
    run(tmp_path, ESCAPED.replace(", start_new_session=True", ""), on_line=heard.append)
    assert time.monotonic() - began < 5
    assert _gone(int(heard[0]))


def test_every_line_is_heard_in_order_however_slow_the_listener_and_in_its_own_thread(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []

    def listen(line: str) -> None:
        if len(heard) % 5000 == 0:
            time.sleep(0.3)
        heard.append((line, threading.get_ident()))

    run(tmp_path, "for n in range(20_000): print(f'{n} é')", on_line=listen)
    assert heard == [(f"{n} é", threading.get_ident()) for n in range(20_000)]


def test_a_listener_s_own_error_ends_the_child(tmp_path: Path) -> None:
    def listen(line: str) -> None:
        raise KeyError(line)

    began = time.monotonic()
    with pytest.raises(KeyError):
        run(tmp_path, "import time; print('x', flush=True); time.sleep(30)", on_line=listen)
    assert time.monotonic() - began < 10
