"""Whether our load generator is the bottleneck: the same load by wrk, where that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.peers.measured import Wire
from benchmarks.peers.servers import Running

CONNECTIONS = 64
SECONDS = 3.0


def compare(running: list[Running], wires: dict[str, Wire], work: Path) -> None:
    """Print requests a second by either, of the servers that are fast enough for it to matter."""
    wrk = shutil.which("wrk")
    if wrk is None:
        print("\nwrk is not installed: the load generator was not compared with it")
        return
    print(f"\nsingle-row requests a second at {CONNECTIONS} connections, by our generator and by wrk")
    for one in running:
        if one.server.name in ("ours", "empty"):
            wire = wires[one.server.name]
            ours = wire.load(one.port, 1, CONNECTIONS, SECONDS).rps
            theirs = _wrk(wrk, one.port, wire, work)
            print(f"{one.server.label:<26} {ours:9,.0f} {theirs:9,.0f}")


def _wrk(wrk: str, port: int, wire: Wire, work: Path) -> float:
    script = work / "wrk.lua"
    bodies = ",\n".join(f"[==[{body.decode()}]==]" for body in wire.bodies[1])
    script.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f"local requests, i = {{{bodies}}}, 0\n"
        "function init(args) for n, body in ipairs(requests) do "
        "requests[n] = wrk.format(nil, nil, nil, body) end end\n"
        "function request() i = i % #requests + 1 return requests[i] end\n"
    )
    argv = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS:.0f}s", "-s", str(script)]
    done = subprocess.run(
        [*argv, f"http://127.0.0.1:{port}{wire.path}"], check=True, capture_output=True, text=True, timeout=60
    )
    found = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    if found is None or "Non-2xx" in done.stdout:
        raise RuntimeError(f"wrk said {done.stdout}")
    return float(found[1])
