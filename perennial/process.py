"""The one place that starts other programs: scrubbed environment, a time limit, no orphan left behind."""

from __future__ import annotations

import codecs
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from perennial.errors import ChildFailed

# What a child may inherit. Nothing of ours (PERENNIAL_*, PREFECT_*, AWS_*, database URLs) is on this list.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME")
# For the programs that fetch packages: where to fetch from, and whom to trust.
_NETWORK = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "HTTPS_PROXY",
    "HTTP_PROXY",
)
_NETWORK_PREFIXES = ("UV_", "PIP_", "https_proxy", "http_proxy", "no_proxy", "NO_PROXY")

TAIL_LINES = 25

# How long what a child left behind may hold its output open once the child itself has ended.
_HELD_SECONDS = 1.0
_PIPE_BYTES = 1 << 20  # more than a pipe holds


def scrubbed_environment(*, network: bool = False, **extra: str) -> dict[str, str]:
    """The environment of a child: a short allow-list of ours, plus `extra`.

    `network` adds what a package client needs to reach its index.
    """
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    if network:
        inherited |= {
            name: value
            for name, value in os.environ.items()
            if name in _NETWORK or name.startswith(_NETWORK_PREFIXES)
        }
    return inherited | extra


class Child(Protocol):
    """A process that was started: the leader of its own process group, its output a stream of lines."""

    @property
    def pid(self) -> int: ...

    @property
    def output(self) -> IO[str]: ...

    def wait(self) -> int:
        """The exit code, once it has ended; −N when signal N ended it."""


Spawn = Callable[[Sequence[str], Path, Mapping[str, str]], Child]


def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    timeout_seconds: float,
    log: Path,
    what: str,
    allowed_codes: Sequence[int] = (0,),
    on_line: Callable[[str], None] | None = None,
    spawn: Spawn | None = None,
) -> int:
    """Run a program to its end, its output going line by line to `log` and to `on_line`.

    Returns the exit code. Raises ChildFailed, with the tail of the log, when the program exits with a code
    that is not allowed, is killed by a signal, or runs longer than `timeout_seconds` (its whole process
    group is then killed). A descendant that left the group and keeps the output open is not waited for.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    expired = threading.Event()
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as sink:
        try:
            child = (spawn or _spawn)(argv, cwd, environment)
        except OSError as error:
            raise ChildFailed(f"{what}: {argv[0]} could not be started: {error.strerror}") from error

        def expire() -> None:
            expired.set()
            kill_group(child.pid)

        timer = threading.Timer(timeout_seconds, expire)
        timer.start()
        ending = _Ending(child, timer)
        try:
            for line in _lines(child, ending):
                sink.write(line + "\n")
                sink.flush()
                tail.append(line)
                if on_line is not None:
                    on_line(line)
            code = ending.code()
        except BaseException:
            if not ending.has_come():
                kill_group(child.pid)
            raise
        finally:
            ending.close()
            child.output.close()

    if expired.is_set():
        raise ChildFailed(
            f"{what} was stopped after {time.monotonic() - started:.0f} s{_shown(tail)}",
            f"an end within {timeout_seconds:.0f} s, the limit of this step",
            "make it faster, or raise its limit under [tool.perennial.limits] in pyproject.toml",
        )
    if code < 0:
        name = signal.Signals(-code).name
        raise ChildFailed(
            f"{what} was killed by {name}{_shown(tail)}",
            "a process that ends by itself" + (" (out of memory?)" if name == "SIGKILL" else ""),
            "prefect flow-run retry RUN-ID, which continues a build at this step",
        )
    if code not in allowed_codes:
        raise ChildFailed(f"{what} ended with an error, exit code {code}{_shown(tail)}")
    return code


class _Ending:
    """The end of a child, waited for beside the reading of its output: `descriptor` reads as closed then."""

    def __init__(self, child: Child, timer: threading.Timer) -> None:
        self.descriptor, self._write = os.pipe()
        self._child, self._timer = child, timer
        self._code: Future[int] = Future()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def has_come(self) -> bool:
        return self._code.done()

    def code(self) -> int:
        """The exit code, once there is one."""
        return self._code.result()

    def close(self) -> None:
        """Returns once the child has ended."""
        self._thread.join()
        os.close(self.descriptor)

    def _wait(self) -> None:
        try:
            self._code.set_result(self._child.wait())
        except BaseException as error:
            self._code.set_exception(error)
        finally:
            self._timer.cancel()
            os.close(self._write)


def _lines(child: Child, ending: _Ending) -> Iterator[str]:
    """The lines of the output, until nobody holds it any more or _HELD_SECONDS after the child's end."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    pending, output, until = "", child.output.fileno(), None
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        watched = [output] if until is not None else [output, ending.descriptor]
        ready = _readable(watched, left)
        if ending.descriptor in ready:
            until = time.monotonic() + _HELD_SECONDS
        chunk = os.read(output, _PIPE_BYTES) if output in ready else b""
        *lines, pending = (pending + decoder.decode(chunk)).split("\n")
        yield from lines
        if output in ready and not chunk:
            break
        if until is not None and time.monotonic() >= until and left is not None:
            kill_group(child.pid)  # whoever of its group is left
            break
    pending += decoder.decode(b"", final=True)
    if pending:
        yield pending.removesuffix("\n")


def _readable(descriptors: Sequence[int], timeout_seconds: float | None) -> set[int]:
    """Those that can be read, or were closed at their other end. (select() knows none above 1023.)"""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    milliseconds = None if timeout_seconds is None else int(timeout_seconds * 1000) + 1
    return {descriptor for descriptor, _ in poll.poll(milliseconds)}


def capture(argv: Sequence[str], *, cwd: Path, environment: Mapping[str, str], timeout_seconds: float) -> str:
    """Run a short program and return its standard output; ChildFailed carries what it said on stderr."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildFailed(f"{argv[0]} did not end within {timeout_seconds:.0f} s") from error
    except OSError as error:
        raise ChildFailed(f"{argv[0]} could not be started: {error.strerror}") from error
    if done.returncode:
        raise ChildFailed(done.stderr.strip() or f"{argv[0]} exited with code {done.returncode}")
    return done.stdout


def start_daemon(argv: Sequence[str], *, cwd: Path, environment: Mapping[str, str], log: Path) -> int:
    """Start a program that outlives us, in a session of its own, and return its process id.

    On Linux its orphaned descendants become its children again, whatever session they moved to, so that
    whoever ends it can find them all.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    adopting = [sys.executable, "-c", _ADOPT_ORPHANS] if sys.platform == "linux" else []
    with log.open("ab") as sink:
        return subprocess.Popen(
            [*adopting, *argv],
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).pid


_ADOPT_ORPHANS = """
import ctypes, os, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class _Spawned:
    """A program of its own."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        assert popen.stdout is not None
        self.pid = popen.pid
        self.output = popen.stdout
        self.wait = popen.wait


def _spawn(argv: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Child:
    return _Spawned(
        subprocess.Popen(
            [*_die_with_parent(), *argv],
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    )


def start_attached(
    argv: Sequence[str], *, cwd: Path, environment: Mapping[str, str], descriptor: int
) -> subprocess.Popen[bytes]:
    """Start a program that holds one end of a socket pair of ours, and ends when ours is closed."""
    return subprocess.Popen(
        list(argv),
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        start_new_session=True,
    )


def _die_with_parent() -> list[str]:
    """On Linux, a child must not outlive a parent that is killed: `kill -9` runs no clean-up of ours."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def kill_group(pid: int) -> None:
    """SIGKILL to a process and all it started; one that is gone is no error."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _shown(tail: Sequence[str]) -> str:
    return ". Its last lines:\n" + "\n".join(f"    {line}" for line in tail) if tail else ""
