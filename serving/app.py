"""The HTTP face of one release, as a plain ASGI application.

Every answer, errors too, names the release that made it. Predictions run on a thread of their own, so that
health is answered while the model works.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from serving import openapi, v2
from serving.contract import RELEASE_HEADER, InputSchema, Manifest
from serving.errors import BadRequest
from serving.metrics import Metrics
from serving.prediction_log import PredictionLog, Record
from serving.scorer import Scorer

logger = logging.getLogger("perennial.server")

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

BODY_SECONDS = 30.0  # how long a client may take to send its body
BODIES_BYTES = 256 * 1_048_576  # of all bodies at once, from their first byte to their answer
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
JSON, TEXT = b"application/json", b"text/plain; version=0.0.4; charset=utf-8"
CLIENT_LEFT = 499  # counted, never sent


@dataclass(frozen=True)
class Answer:
    """A response before it has its common headers."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass
class Call:
    """One request on its way."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    request_id: str
    route: str = "unknown"
    close: bool = False


class ClientLeft(Exception):
    """The client closed the connection before it had sent its body."""


@dataclass
class Budget:
    """Bytes that requests hold in memory; touched from the event loop's thread only."""

    limit: int
    held: int = 0

    def take(self, size: int) -> None:
        """Raises `BadRequest` (429) where there is no room."""
        if self.held + size > self.limit:
            raise BadRequest(
                429,
                "the bodies of other requests take all the memory there is for them",
                expected=f"at most {self.limit} bytes in all requests",
                retry_after_seconds=1,
                close=True,
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """What was taken, once the request is answered."""
        self.held -= size


@dataclass
class App:
    """Serves one release. `scorer` is None until the model is loaded; `draining` from the stop signal on."""

    manifest: Manifest
    schema: InputSchema
    log: PredictionLog
    scorer: Scorer | None = None
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        # A body of the size that the release allows fits always, when it is alone.
        self.bodies = Budget(max(BODIES_BYTES, self.manifest.limits.max_body_bytes))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._release = self.manifest.release_id.encode()
        self._openapi = msgspec.json.encode(openapi.document(self.manifest, self.schema))
        self._metadata = msgspec.json.encode({"manifest": self.manifest, "schema": self.schema})

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.scorer is not None and not self.draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        call = _call(scope)
        try:
            answer = await self._answer(call, receive)
        except BadRequest as error:
            answer = self._refusal(call, error)
        except ClientLeft:
            self.metrics.observe(call.route, CLIENT_LEFT, time.perf_counter() - started)
            return
        except Exception:
            logger.exception("request %s failed", call.request_id)
            answer = self._error(call, 500, "the prediction failed; the service's log has the request id")
        await self._send(send, call, answer)
        self.metrics.observe(call.route, answer.status, time.perf_counter() - started)

    async def _answer(self, call: Call, receive: Receive) -> Answer:
        match call.path.strip("/").split("/"):
            case ["predict"]:
                call.route = "/predict"
                return await self._predict(call, receive, self._rows, self._predictions)
            case ["health", "live"]:
                return self._get(call, "/health/live", {"status": "live"})
            case ["health", "ready"]:
                state = "ready" if self.ready else "draining" if self.draining else "loading"
                return self._get(call, "/health/ready", {"status": state}, 200 if self.ready else 503)
            case ["metadata"]:
                return self._get(call, "/metadata", self._metadata)
            case ["openapi.json"]:
                return self._get(call, "/openapi.json", self._openapi)
            case ["metrics"]:
                counts = self.log.counts
                text = self.metrics.text(
                    self.manifest.release_id, counts.accepted, counts.dropped, counts.stored
                )
                return self._get(call, "/metrics", text.encode(), content_type=TEXT)
            case ["v2", *rest]:
                return await self._v2(call, rest, receive)
            case _:
                raise BadRequest(
                    404, f"no such path: {call.path[:80]}", expected="POST /predict, see /openapi.json"
                )

    async def _v2(self, call: Call, path: list[str], receive: Receive) -> Answer:
        match path:
            case []:
                return self._get(call, "/v2", v2.server_metadata())
            case ["health", "live"]:
                return self._get(call, "/v2/health/live", {"live": True})
            case ["health", "ready"]:
                return self._get(call, "/v2/health/ready", {"ready": self.ready}, 200 if self.ready else 503)
            case ["models", name, "versions", version, *rest]:
                self._need_name("version", version, self.manifest.release_id)
            case ["models", name, *rest]:
                pass
            case _:
                raise BadRequest(
                    404, f"no such path: {call.path[:80]}", expected="a path of the Open Inference Protocol"
                )
        self._need_name("model", name, self.manifest.project)
        match rest:
            case []:
                return self._get(call, "/v2/models/{name}", v2.model_metadata(self.manifest, self.schema))
            case ["ready"]:
                body = {"name": name, "ready": self.ready}
                return self._get(call, "/v2/models/{name}/ready", body, 200 if self.ready else 503)
            case ["infer"]:
                call.route = "/v2/models/{name}/infer"
                return await self._predict(call, receive, self._v2_rows, self._v2_answer)
            case _:
                raise BadRequest(
                    404, f"no such path: {call.path[:80]}", expected="a path of the Open Inference Protocol"
                )

    def _need_name(self, kind: str, found: str, expected: str) -> None:
        if found != expected:
            raise BadRequest(404, f"no {kind} {found[:80]!r} here", found=found[:80], expected=expected)

    def _get(
        self, call: Call, route: str, body: object, status: int = 200, content_type: bytes = JSON
    ) -> Answer:
        call.route = route
        if call.method not in ("GET", "HEAD"):
            raise _wrong_method(call, "GET")
        encoded = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return Answer(status, encoded, content_type)

    async def _predict(
        self,
        call: Call,
        receive: Receive,
        rows_of: Callable[[Call, Any], list[Any]],
        answer_of: Callable[[Call, list[float]], object],
    ) -> Answer:
        if call.method != "POST":
            raise _wrong_method(call, "POST")
        scorer = self.scorer
        if scorer is None:
            return self._error(call, 503, "the model is not loaded yet", (b"retry-after", b"1"))
        self._need_slot()  # asked again below: here it spares the client the sending
        content_type = call.headers.get(b"content-type", JSON).partition(b";")[0].strip().lower()
        if content_type != JSON or b"content-encoding" in call.headers:
            found = (call.headers.get(b"content-encoding") or content_type).decode("latin-1")[:80]
            raise BadRequest(
                415, f"the body is {found}", found=found, expected="application/json, not compressed"
            )
        body = bytearray()
        try:
            await _read_body(call, receive, body, self.manifest.limits.max_body_bytes, self.bodies)
            self._need_slot()
            # Only now: a client that sends slowly holds no slot.
            self.metrics.in_flight += 1
            try:
                work = asyncio.get_running_loop().run_in_executor(
                    self._pool, self._work, scorer, call, body, rows_of, answer_of
                )
                encoded, predictions = await work
                self.metrics.predictions += predictions
            finally:
                self.metrics.in_flight -= 1
        finally:
            self.bodies.give_back(len(body))
        return Answer(200, encoded)

    def _need_slot(self) -> None:
        limit = self.manifest.limits.max_concurrent_requests
        if self.metrics.in_flight >= limit:
            raise BadRequest(
                429,
                f"{self.metrics.in_flight} requests are at work, which is the limit",
                expected=f"at most {limit} at once",
                retry_after_seconds=1,
            )

    def _work(
        self,
        scorer: Scorer,
        call: Call,
        body: bytearray,
        rows_of: Callable[[Call, Any], list[Any]],
        answer_of: Callable[[Call, list[float]], object],
    ) -> tuple[bytes, int]:
        """From body to body, on the prediction thread."""
        try:
            decoded = msgspec.json.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(
                400, f"the body is not JSON: {error}"[:200], expected="a JSON document"
            ) from None
        rows = rows_of(call, decoded)
        limit = self.manifest.limits.max_rows
        if not 1 <= len(rows) <= limit:
            raise BadRequest(
                422,
                f"{len(rows)} rows, expected 1 to {limit}",
                found=str(len(rows)),
                expected=f"1 to {limit} rows",
            )
        predictions = scorer.predict(rows)
        self.log.append(
            Record(
                release_id=self.manifest.release_id,
                request_id=call.request_id,
                time=datetime.now(UTC).isoformat(),
                environment=self.log.environment,
                rows=rows,
                predictions=predictions,
            )
        )
        return msgspec.json.encode(answer_of(call, predictions)), len(predictions)

    def _rows(self, call: Call, body: Any) -> list[Any]:
        if isinstance(body, list):
            return body
        if not isinstance(body, dict):
            raise BadRequest(
                422, 'the body is a plain value, expected {"rows": [...]}, an array of rows or a row'
            )
        checker = self.scorer.checker if self.scorer else None
        if "rows" not in body or (checker and "rows" in checker.names):
            return [body]
        if extra := sorted(body.keys() - {"rows"}):
            raise BadRequest(422, f"the body has {extra[0][:80]!r} beside rows", expected="rows alone")
        if not isinstance(body["rows"], list):
            raise BadRequest(422, "rows is not an array", expected="an array of rows")
        return body["rows"]

    def _predictions(self, call: Call, predictions: list[float]) -> object:
        return {
            "release_id": self.manifest.release_id,
            "request_id": call.request_id,
            "predictions": predictions,
        }

    def _v2_rows(self, call: Call, body: Any) -> list[Any]:
        # The protocol's own request id, where the header gives none.
        own = body.get("id") if isinstance(body, dict) else None
        if b"x-request-id" not in call.headers and isinstance(own, str) and REQUEST_ID.fullmatch(own):
            call.request_id = own
        return v2.rows_of(body, self.schema, self.manifest.limits.max_rows)

    def _v2_answer(self, call: Call, predictions: list[float]) -> object:
        return v2.answer(self.manifest, call.request_id, predictions)

    def _refusal(self, call: Call, error: BadRequest) -> Answer:
        call.close = call.close or error.close
        headers: list[tuple[bytes, bytes]] = []
        if error.retry_after_seconds is not None:
            headers.append((b"retry-after", str(error.retry_after_seconds).encode()))
        if error.status == 405:
            headers.append((b"allow", str(error.details["expected"]).encode()))
        return self._error(call, error.status, error.reason, *headers, **error.details)

    def _error(
        self, call: Call, status: int, reason: str, *headers: tuple[bytes, bytes], **details: object
    ) -> Answer:
        body = {
            "error": reason,
            **details,
            "request_id": call.request_id,
            "release_id": self.manifest.release_id,
        }
        return Answer(status, msgspec.json.encode(body), headers=tuple(headers))

    async def _send(self, send: Send, call: Call, answer: Answer) -> None:
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", str(len(answer.body)).encode()),
            (RELEASE_HEADER.encode(), self._release),
            (b"x-request-id", call.request_id.encode()),
            *answer.headers,
        ]
        if call.close or self.draining:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if call.method == "HEAD" else answer.body})


def _call(scope: Scope) -> Call:
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    request_id = given if REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
    return Call(scope["method"], scope["path"], headers, request_id)


def _wrong_method(call: Call, expected: str) -> BadRequest:
    return BadRequest(
        405, f"{call.route} does not take {call.method[:20]}", found=call.method[:20], expected=expected
    )


async def _read_body(call: Call, receive: Receive, body: bytearray, limit: int, budget: Budget) -> None:
    """Fill `body`, each byte taken from `budget`, which gets them back from the caller.

    Raises `BadRequest` 413 once the body is known to be too large, 429 where the budget has no room, 408 if
    it stays away.
    """
    announced = call.headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        # A client that waits for leave to send will not send: its connection cannot be used again.
        raise _too_large(announced.decode(), limit, close=b"expect" in call.headers)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                chunk = message.get("body", b"")
                if len(body) + len(chunk) > limit:
                    raise _too_large(f"more than {limit}", limit)
                budget.take(len(chunk))
                body += chunk
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        raise BadRequest(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", close=True) from None


def _too_large(found: str, limit: int, close: bool = False) -> BadRequest:
    return BadRequest(
        413, f"the body has {found} bytes", found=found, expected=f"at most {limit} bytes", close=close
    )
