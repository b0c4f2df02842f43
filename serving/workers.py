"""The worker processes of one service: forked, started again when they die, told to drain, waited for.

A worker that dies takes its own connections with it, and no others: every worker has a socket of its own on
the port (SO_REUSEPORT), so the kernel gives new connections to those that live.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from serving.contract import EXPLAINED_FAILURE
from serving.metrics import Shared

logger = logging.getLogger("perennial.server")

Work = Callable[[Shared, int, bool], int]

LAST_WORDS_SECONDS = 10.0  # beyond what draining and the log may take; then the worker is killed
SAME_SIGNAL_SECONDS = 1.0
QUICK_SECONDS = 5.0  # a worker that dies sooner after its start has a fault that a new one will have too
QUICK_DEATHS = 5
MOST_PAUSE_SECONDS = 2.0  # between two tries to start a worker again; signals wait so long
_PR_SET_PDEATHSIG = 1
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # of mallopt
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class Workers:
    """Runs in the parent, which has no threads and no event loop: forking it is safe."""

    def __init__(self, count: int, shared: Shared, work: Work) -> None:
        self._count = count
        self._shared = shared
        self._work = work
        self._running: dict[int, tuple[int, float]] = {}  # pid → worker, when it started
        self._quick_deaths = 0
        self._code = 0

    def run(self, drain_seconds: float) -> int:
        """Until a signal, or until a worker says that it never will work; the exit code of the service."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, nobody could be waited for
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for index in range(self._count):
            self._start(index, again=False)
        while not self._shared.draining:
            received = signal.sigwait(_SIGNALS)
            if received == signal.SIGCHLD:
                self._reap()
            else:
                logger.info("%s: draining", signal.Signals(received).name)
                self._shared.drain()
        self._tell(signal.SIGTERM)
        self._wait(2 * drain_seconds + LAST_WORDS_SECONDS)
        return self._code

    def _start(self, index: int, again: bool) -> None:
        gc.freeze()  # what is there by now is shared with the child; a collection would copy it
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(index, again, parent)
        self._running[pid] = (index, time.monotonic())

    def _become(self, index: int, again: bool, parent: int) -> None:
        """In the child: never returns."""
        code = 1
        try:
            if sys.platform == "linux":  # elsewhere a worker notices that its parent has gone (see worker.py)
                libc = ctypes.CDLL(None)
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if hasattr(libc, "mallopt"):
                    # glibc keeps an arena per thread, each as large as its peak, and the room of large
                    # pieces once it has seen some: a worker would stay as large as its largest moment.
                    libc.mallopt(_M_ARENA_MAX, 1)
                    libc.mallopt(_M_MMAP_THRESHOLD, 262_144)
                if os.getppid() != parent:  # it died before it could be watched
                    os._exit(code)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            code = self._work(self._shared, index, again)
        except BaseException:
            logger.exception("worker %d", index)
        finally:
            sys.stderr.flush()
            os._exit(code)  # the interpreter would wait for threads, such as one that still loads a model

    def _reap(self) -> None:
        """Start again what has died, unless there is no point in it."""
        for index, code, seconds in self._ended():
            self._shared.restart(index)
            if code == EXPLAINED_FAILURE and not self._shared.ready:
                self._code = code
                self._shared.drain()
                return
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            logger.error("worker %d ended with %s after %.0f s", index, how, seconds)
            self._quick_deaths = self._quick_deaths + 1 if seconds < QUICK_SECONDS else 0
            if self._shared.ready:  # the others serve on, whatever keeps this one from it
                time.sleep(min(0.1 * self._quick_deaths**2, MOST_PAUSE_SECONDS))
            elif self._quick_deaths > QUICK_DEATHS:
                logger.error("the workers die as soon as they start: the service ends")
                self._code = 1
                self._shared.drain()
                return
            self._start(index, again=True)

    def _ended(self) -> list[tuple[int, int, float]]:
        ended = []
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid not in self._running:
                continue  # the orphan of a worker: the first process of a container inherits those
            index, started = self._running.pop(pid)
            ended.append((index, os.waitstatus_to_exitcode(status), time.monotonic() - started))
        return ended

    def _tell(self, what: signal.Signals) -> None:
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def _wait(self, seconds: float) -> None:
        """For all to end; a second signal, or the end of patience, kills them."""
        started = time.monotonic()
        while self._running:
            waited = time.monotonic() - started
            again = signal.sigpending() & {signal.SIGTERM, signal.SIGINT}
            if again and waited < SAME_SIGNAL_SECONDS:
                signal.sigwait(again)  # the same once more, such as to a process and then to its group
            elif again or waited > seconds:
                self._tell(signal.SIGKILL)
            for index, code, _ in self._ended():
                if code == -signal.SIGTERM:
                    continue  # it had only just begun: it knew no signals, and had nothing to drain
                if code not in (0, EXPLAINED_FAILURE):
                    logger.error("worker %d ended with %d while it drained", index, code)
                self._code = self._code or code
            time.sleep(0.02)
