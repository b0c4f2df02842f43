"""A service for tests of what runs around services: it answers for a release and drains on SIGTERM.

    python service.py --release-id ID --host H --port P
        [--starts-in SECONDS | --never-ready | --dies REASON | --leaves-child]

POST /predict with {"seconds": S} answers after S seconds, with {"status": N} with that status.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import uvicorn


def service(release_id: str, ready: bool) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message["body"]
            if not message.get("more_body"):
                break
        status, answer = 200, {"release_id": release_id, "predictions": [0.5], "path": scope["path"]}
        if scope["path"] == "/health/ready":
            status = 200 if ready else 503
        elif scope["path"] == "/predict":
            asked = json.loads(body or b"{}")
            await asyncio.sleep(asked.get("seconds", 0))
            status = asked.get("status", 200)
            answer["bytes"] = len(body)
            answer["headers"] = {name.decode(): value.decode() for name, value in scope["headers"]}
        content = json.dumps(answer).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"x-perennial-release", release_id.encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--release-id", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--starts-in", type=float, default=0.0)
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--dies", default="")
    parser.add_argument("--leaves-child", action="store_true")
    asked = parser.parse_args()
    print(f"{asked.release_id} starts", flush=True)
    time.sleep(asked.starts_in)
    if asked.dies:
        sys.exit(asked.dies)
    if asked.leaves_child:
        subprocess.Popen(["sleep", "3600"], env={}, start_new_session=True)
    uvicorn.run(
        service(asked.release_id, not asked.never_ready),
        host=asked.host,
        port=asked.port,
        log_level="warning",
        lifespan="off",
    )


if __name__ == "__main__":
    main()
