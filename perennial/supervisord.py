"""supervisord with a shorter breath: its own loop looks at its processes once a second.

A process that died is noticed in one round and started again in the next: up to two seconds, ten times as
long as Envoy or a small service takes to start.
"""

from __future__ import annotations

from typing import Any

from supervisor import poller, supervisord

_ROUND_SECONDS = 0.1


class _Poller(poller.Poller):  # type: ignore[misc]
    def poll(self, timeout: float) -> Any:
        return super().poll(min(timeout, _ROUND_SECONDS))


if __name__ == "__main__":
    poller.Poller = _Poller
    supervisord.main()
