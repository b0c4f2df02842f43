"""A process that has an environment's libraries imported already and forks a child for each request.

Started as `python -m serving.warm FD`, FD being one end of a Unix socket pair. Its starter sends one
`contract.ChildRequest` at a time, a JSON line with the file descriptor for the child's output, and gets two
lines back: `ChildStarted` at once and `ChildEnded` at the end. When the starter is gone, so is the child, and
this process.

What is imported beforehand is what earlier children of this environment imported, out of `LIBRARIES` only:
these start no threads when they are imported, so that forking is safe. The project's own code is never
among it: each child imports that afresh.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

import msgspec

from serving.contract import ChildEnded, ChildRequest, ChildStarted

LIBRARIES = frozenset({"joblib", "msgspec", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "skops"})
_LEARNED = Path(sys.prefix) / "warm-modules.json"
_LINE = 1 << 20
_PR_SET_PDEATHSIG = 1


def main(control: socket.socket) -> None:
    """Serve requests until the other end is closed. Returns in children too, through SystemExit."""
    gc.set_threshold(50_000, 20, 50)  # imports make a million objects that stay
    _import_learned()
    gc.freeze()  # children share these pages instead of touching each
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    while received := _receive(control):
        request, output = received
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for left in (woken, wake):
                os.close(left)
            control.close()
            _become(request, output)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the child does so too: whoever is first
        os.close(output)
        _send(control, ChildStarted(pid))
        code = _wait(pid, control, woken)
        if code is None:
            return
        _send(control, ChildEnded(code))


def _become(request: ChildRequest, output: int) -> None:
    """In the child: be `python -m module`, and never return."""
    if sys.platform == "linux":  # elsewhere a server that is killed leaves its child to the time limit
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    further = request.environment.get("PYTHONPATH", "")
    sys.path[:1] = [request.cwd, *(part for part in further.split(os.pathsep) if part)]
    sys.argv = [request.module, *request.arguments]
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # or every child would draw the same numbers
    code: object = 0
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    _learn()
    gc.freeze()  # nothing is gained by a last round through objects that end with the process
    sys.exit(code)  # type: ignore[arg-type]


def _wait(pid: int, control: socket.socket, woken: int) -> int | None:
    """The child's exit code, or None when the starter went away first: the child is then killed."""
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if control.fileno() in ready and not control.recv(1, socket.MSG_PEEK):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None


def _receive(control: socket.socket) -> tuple[ChildRequest, int] | None:
    line, descriptors, _, _ = socket.recv_fds(control, _LINE, 1)
    while line and not line.endswith(b"\n"):
        more = control.recv(_LINE)
        if not more:
            return None
        line += more
    return (msgspec.json.decode(line, type=ChildRequest), descriptors[0]) if line else None


def _send(control: socket.socket, message: ChildStarted | ChildEnded) -> None:
    with contextlib.suppress(BrokenPipeError):  # the next look finds the starter gone
        control.sendall(msgspec.json.encode(message) + b"\n")


def _import_learned() -> None:
    try:
        names = json.loads(_LEARNED.read_text())
    except (OSError, ValueError):
        return
    for name in names:
        if name.partition(".")[0] in LIBRARIES:
            with contextlib.suppress(Exception):  # a child that needs it will say what is wrong
                importlib.import_module(name)


def _learn() -> None:
    """Write down what this child used of the libraries, for the next one that is started."""
    used = {name for name in tuple(sys.modules) if name.partition(".")[0] in LIBRARIES}
    with contextlib.suppress(OSError, ValueError):
        known = set(json.loads(_LEARNED.read_text())) if _LEARNED.exists() else set()
        if not used <= known:
            temporary = _LEARNED.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(sorted(used | known)))
            temporary.replace(_LEARNED)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
