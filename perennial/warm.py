"""Start a project's modules from a process that has its libraries imported: an import saved per step.

One such process per interpreter and environment, kept until `close`. It and its child end when we do: our
end of its socket closes with us, however we end.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from perennial import process
from serving.contract import ChildEnded, ChildRequest, ChildStarted

_servers: dict[tuple[str, frozenset[tuple[str, str]]], _Server] = {}


def spawn(argv: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> process.Child:
    """`PYTHON -m MODULE ARGUMENT…` as a `process.Spawn`, without the imports. Raises OSError."""
    python, dash_m, module, *arguments = argv
    assert dash_m == "-m"
    # What an interpreter reads at its start cannot change afterwards; the search path can.
    started_with = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    key = (python, frozenset(started_with.items()))
    server = _servers.get(key)
    if server is None or not server.alive():
        server = _servers[key] = _Server(python, cwd, started_with)
    return server.start(ChildRequest(module, tuple(arguments), str(cwd), dict(environment)))


def close() -> None:
    """End every such process, as at the end of a flow run."""
    while _servers:
        _servers.popitem()[1].close()


class _Server:
    def __init__(self, python: str, cwd: Path, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = process.start_attached(
                [python, "-m", "serving.warm", str(theirs.fileno())],
                cwd=cwd,
                environment=environment,
                descriptor=theirs.fileno(),
            )
        self._lines = self._control.makefile("rb")
        self._busy = threading.Lock()  # one child at a time

    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self, request: ChildRequest) -> process.Child:
        """Raises OSError when the server is gone."""
        self._busy.acquire()
        read, write = os.pipe()
        output = open(read, encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115, run() closes it
        try:
            socket.send_fds(self._control, [msgspec.json.encode(request) + b"\n"], [write])
            pid = msgspec.json.decode(self._answer(), type=ChildStarted).pid
        except OSError:
            output.close()
            self._busy.release()
            raise
        finally:
            os.close(write)
        return _Forked(pid, output, self)

    def ended(self, pid: int) -> int:
        """The exit code of the child that was started."""
        try:
            return msgspec.json.decode(self._answer(), type=ChildEnded).code
        except OSError:  # the server was killed, most likely for memory, and nobody looks after its child
            process.kill_group(pid)
            return -signal.SIGKILL
        finally:
            self._busy.release()

    def close(self) -> None:
        self._lines.close()
        self._control.close()
        self._process.wait()

    def _answer(self) -> bytes:
        line = self._lines.readline()
        if not line:
            raise OSError(0, "the process that starts the project's code ended")
        return line


class _Forked:
    def __init__(self, pid: int, output: IO[str], server: _Server) -> None:
        self.pid = pid
        self.output = output
        self._server = server

    def wait(self) -> int:
        return self._server.ended(self.pid)
