"""What an installation has: processes, containers, ports, files and open files. Two of them are compared."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from perennial.leftovers import marked
from perennial.supervision import Supervisor
from tests.infra.chaos import World

# What a database keeps beside its file while somebody reads it.
_PASSING = ("-wal", "-shm", "-journal")
_LISTENING = "0A"


@dataclass(frozen=True)
class Inventory:
    """Names of things, with how many there are of each."""

    things: Counter[str]

    @classmethod
    def of(cls, world: World) -> Inventory:
        things: Counter[str] = Counter()
        pids = marked(world.here.root)
        things.update(f"process {_command(pid)}" for pid in pids)
        things["ports"] = len(_listening(pids))
        # Of containers also those that were made and do not run.
        things.update(f"instance {instance.endpoint.name}" for instance in world.target.instances())
        for path in world.here.root.rglob("*"):
            if path.is_file() and not path.name.endswith(_PASSING):
                things[f"file {path.relative_to(world.here.root)}"] += 1
        # A handle or two come and go; one per deploy would be hundreds.
        supervisor = Supervisor(world.here).pid()
        for who, pid in (("supervisord", supervisor), ("the deploys' process", os.getpid())):
            things[f"ten open files of {who}"] = len(list(Path(f"/proc/{pid}/fd").iterdir())) // 10
        return cls(things)

    def beyond(self, before: Inventory) -> list[str]:
        """What there is more than there was."""
        return sorted((self.things - before.things).elements())


def _command(pid: int) -> str:
    """Its command line, without the port: that one may be another after a restart."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return re.sub(r"--port \d+", "", words).strip()
    return "gone"


def _listening(pids: list[int]) -> set[int]:
    """The ports of TCP on which one of the processes listens."""
    sockets: dict[str, int] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == _LISTENING:
            sockets[f"socket:[{rest[5]}]"] = int(local.rpartition(":")[2], 16)
    found = set()
    for pid in pids:
        with suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    found.add(sockets.get(str(handle.readlink()), 0))
    return found - {0}
