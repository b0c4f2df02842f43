"""The HTTP face of one release: what each path answers. Every answer, errors too, names the release."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import msgspec

from serving import metrics, openapi, v2
from serving.contract import RELEASE_HEADER, InputSchema, Manifest, Plan
from serving.decode import Decoder, Row
from serving.engine import Engine, Job, Model
from serving.errors import BadRequest
from serving.http import JSON, Refused, Request
from serving.metrics import (
    CONNECTIONS,
    DROPPED,
    IN_FLIGHT,
    INFER,
    LOGGED,
    MISFITS,
    PREDICT,
    PREDICTIONS,
    READY,
    RESIDENT,
    ROUTES,
    STORED,
    Metrics,
)

if TYPE_CHECKING:
    from serving.prediction_log import PredictionLog

logger = logging.getLogger("perennial.server")

BODIES_BYTES = 256 * 1_048_576  # of all bodies at once in one worker, from their first byte to their answer
OFF_LOOP_BYTES = 131_072  # a longer body is decoded on the prediction thread
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TEXT = b"text/plain; version=0.0.4; charset=utf-8"
ROUTE = {name: index for index, name in enumerate(ROUTES)}


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
            )
        self.held += size


class App:
    """Serves one release in one worker process. Without an engine until `serve` has given it the model."""

    def __init__(
        self,
        manifest: Manifest,
        schema: InputSchema,
        plan: Plan | None,
        decoder: Decoder,
        log: PredictionLog,
        own: Metrics,
    ) -> None:
        self.manifest = manifest
        self.decoder = decoder
        self.log = log
        self.metrics = own
        self.shared = own.shared
        self.closing = False
        self.engine: Engine | None = None
        self.path = plan.path if plan else "original"
        # A body of the size that the release allows fits always, when it is alone.
        self.bodies = Budget(max(BODIES_BYTES, manifest.limits.max_body_bytes))
        self._columns = {column.name: column for column in decoder.columns}
        self._limits = manifest.limits
        self._prefix = os.urandom(8).hex()
        self._numbers = count()
        names = {"release_id": manifest.release_id}
        self._answer_head = msgspec.json.encode(names)[:-1] + b',"request_id":"'
        served = {"path": self.path, "reason": plan.reason if plan else "built before releases had a plan"}
        document = {"manifest": manifest, "schema": schema, "serving": served}
        self._gets: dict[bytes, tuple[int, Callable[[], tuple[int, bytes]]]] = {
            b"/health/live": _fixed("/health/live", {"status": "live"}),
            b"/health/ready": (ROUTE["/health/ready"], self._ready),
            b"/metadata": _fixed("/metadata", document),
            b"/openapi.json": _fixed("/openapi.json", openapi.document(manifest, schema)),
            b"/v2": _fixed("/v2", v2.server_metadata()),
            b"/v2/health/live": _fixed("/v2/health/live", {"live": True}),
            b"/v2/health/ready": (ROUTE["/v2/health/ready"], partial(self._v2_ready, {})),
        }
        self._model_metadata = msgspec.json.encode(v2.model_metadata(manifest, schema))

    def serve(self, model: Model) -> None:
        """Answer predictions from now on. Called on the event loop's thread."""
        self.engine = Engine(model, self.metrics, self._limits.max_rows)
        self.metrics.own[READY] = 1.0

    @property
    def state(self) -> str:
        """Ready only when all workers are: a client cannot choose between them."""
        if self.shared.draining or self.closing:
            return "draining"
        return "ready" if self.shared.ready else "loading"

    # serving.http.Handler

    def admit(self, request: Request) -> None:
        """Called with the head of a request."""
        limit = request.body_limit = self._limits.max_body_bytes
        announced = request.headers.get(b"content-length", b"0")
        if len(announced) > 15 or int(announced) > limit:
            found = announced[:20].decode("latin-1")
            raise self._refusal(request, _too_large(found, limit))
        if b"expect" in request.headers and request.path == b"/predict":
            try:
                self._need_slot()
            except BadRequest as error:
                raise self._refusal(request, error) from None

    def take(self, request: Request, size: int) -> None:
        """Called with each piece of a body."""
        try:
            self.bodies.take(size)
        except BadRequest as error:
            raise self._refusal(request, error) from None
        request.held += size

    def refuse(self, request: Request, status: int, reason: str, expected: str) -> Refused:
        """The refusal of what is wrong with the protocol."""
        return self._refusal(request, BadRequest(status, reason, expected=expected))

    def done(self, request: Request, status: int) -> None:
        """Called once per request."""
        self.bodies.held -= request.held
        self.metrics.observe(request.route, status, time.perf_counter() - request.started)

    def tick(self, connections: int) -> None:
        """Called once a second."""
        self._count_log()
        self.metrics.own[CONNECTIONS] = connections
        self.metrics.own[RESIDENT] = metrics.resident_bytes()

    def handle(self, request: Request) -> None:
        """Called with each complete request."""
        try:
            if request.path == b"/predict":
                request.route = PREDICT
                self._predict(request)
            else:
                self._route(request)
        except BadRequest as error:
            self._refuse(request, error)
        except Exception:
            self._failed(request)

    # paths

    def _route(self, request: Request) -> None:
        path = request.path if request.path == b"/" else request.path.rstrip(b"/")
        found = self._gets.get(path)
        if found is not None:
            request.route, content = found
            self._get(request, *content())
        elif path == b"/metrics":
            request.route = ROUTE["/metrics"]
            self._need(request, b"GET")
            self._count_log()
            text = metrics.text(self.shared, self.manifest.release_id, self.path)
            self._send(request, 200, text.encode(), TEXT)
        elif path.startswith(b"/v2/models/"):
            self._v2(request, path.decode("latin-1").split("/")[3:])
        elif path == b"/predict":
            request.route = PREDICT
            self._predict(request)
        else:
            shown = path[:80].decode("latin-1")
            raise BadRequest(404, f"no such path: {shown}", expected="POST /predict, see /openapi.json")

    def _v2(self, request: Request, path: list[str]) -> None:
        self._need_name("model", path[0], self.manifest.project)
        rest = path[1:]
        if rest[:1] == ["versions"] and len(rest) > 1:
            self._need_name("version", rest[1], self.manifest.release_id)
            rest = rest[2:]
        match rest:
            case []:
                request.route = ROUTE["/v2/models/{name}"]
                self._get(request, 200, self._model_metadata)
            case ["ready"]:
                request.route = ROUTE["/v2/models/{name}/ready"]
                self._get(request, *self._v2_ready({"name": path[0]}))
            case ["infer"]:
                request.route = INFER
                self._infer(request)
            case _:
                shown = request.path[:80].decode("latin-1")
                raise BadRequest(
                    404, f"no such path: {shown}", expected="a path of the Open Inference Protocol"
                )

    def _predict(self, request: Request) -> None:
        self._need_service(request, JSON)
        rows, limit = self.decoder.rows, self._limits.max_rows
        if request.size > OFF_LOOP_BYTES:
            self._submit(Job(request, self._predicted, decode=partial(rows, request.body, limit)))
        else:
            self._submit(Job(request, self._predicted, rows(request.body, limit)))

    def _infer(self, request: Request) -> None:
        head_length = request.headers.get(v2.HEAD_LENGTH)
        self._need_service(request, *((JSON,) if head_length is None else (JSON, v2.OCTETS)))
        wanted = [False]

        def decode() -> list[Row]:
            asked = v2.parse(request.body, head_length, self._columns, self._limits.max_rows)
            # The protocol's own request id, where the header gives none.
            if b"x-request-id" not in request.headers and REQUEST_ID.fullmatch(asked.request_id or ""):
                request.request_id = asked.request_id or ""
            wanted[0] = asked.binary
            return self.decoder.tensors(asked.columns, asked.rows)

        def finish(job: Job, result: list[float] | BaseException) -> None:
            if (predictions := self._logged(job, result)) is None:
                return
            body, content_type, headers = v2.answer(self.manifest, request.request_id, predictions, wanted[0])
            self._send(request, 200, body, content_type, headers)

        if request.size > OFF_LOOP_BYTES:
            self._submit(Job(request, finish, decode=decode))
        else:
            self._submit(Job(request, finish, decode()))

    def _submit(self, job: Job) -> None:
        assert self.engine is not None
        self.metrics.own[IN_FLIGHT] += 1
        self.engine.submit(job)

    def _predicted(self, job: Job, result: list[float] | BaseException) -> None:
        request = job.request
        predictions = self._logged(job, result)
        if predictions is not None:
            encoded = request.request_id.encode()
            body = (self._answer_head, encoded, b'","predictions":', msgspec.json.encode(predictions), b"}")
            request.answer(200, b"".join(body), JSON, b"x-request-id: " + encoded + b"\r\n")

    def _logged(self, job: Job, result: list[float] | BaseException) -> list[float] | None:
        """The predictions of a job, in the log before they are sent; None where something else was sent."""
        own, request = self.metrics.own, job.request
        own[IN_FLIGHT] -= 1
        if request.finished:  # the client has left
            return None
        if isinstance(result, BaseException):
            if isinstance(result, BadRequest):
                self._refuse(request, result)
            else:
                self._failed(request, result)
            return None
        own[PREDICTIONS] += len(result)
        self.log.append(job.rows, result, request.request_id, request.size, job.feeds)
        return result

    # conditions

    def _need(self, request: Request, *methods: bytes) -> None:
        if request.method not in methods:
            found, expected = request.method[:20].decode("latin-1"), methods[0].decode()
            raise BadRequest(
                405, f"{ROUTES[request.route]} does not take {found}", found=found, expected=expected
            )

    def _need_service(self, request: Request, *content_types: bytes) -> None:
        """All that can be said before the body is looked at."""
        self._name(request)
        self._need(request, b"POST")
        if self.engine is None:
            raise BadRequest(503, "the model is not loaded yet", retry_after_seconds=1)
        self._need_slot()
        headers = request.headers
        given = headers.get(b"content-type", JSON)
        if given not in content_types or b"content-encoding" in headers:
            encoding = headers.get(b"content-encoding")
            kind = given.partition(b";")[0].strip().lower()
            if encoding is not None or kind not in content_types:
                found = (encoding or kind).decode("latin-1")[:80]
                raise BadRequest(
                    415, f"the body is {found}", found=found, expected="application/json, not compressed"
                )

    def _need_slot(self) -> None:
        limit = self._limits.max_concurrent_requests
        at_work = self.shared.total(IN_FLIGHT)
        if at_work >= limit:
            raise BadRequest(
                429,
                f"{at_work:.0f} requests are at work, which is the limit",
                expected=f"at most {limit} at once",
                retry_after_seconds=1,
            )

    def _need_name(self, kind: str, found: str, expected: str) -> None:
        if found != expected:
            raise BadRequest(404, f"no {kind} {found[:80]!r} here", found=found[:80], expected=expected)

    # answers

    def _ready(self) -> tuple[int, bytes]:
        state = self.state
        return (200 if state == "ready" else 503), msgspec.json.encode({"status": state})

    def _v2_ready(self, names: dict[str, str]) -> tuple[int, bytes]:
        ready = self.state == "ready"
        return (200 if ready else 503), msgspec.json.encode({**names, "ready": ready})

    def _get(self, request: Request, status: int, body: bytes) -> None:
        self._need(request, b"GET", b"HEAD")
        self._send(request, status, body, JSON)

    def _identify(self, request: Request) -> bytes:
        """The header line with the request's id."""
        if not request.request_id:
            self._name(request)
        return b"x-request-id: %b\r\n" % request.request_id.encode()

    def _name(self, request: Request) -> None:
        """Give a request its id: the client's, where that is short and safe, or a new one."""
        given = request.headers.get(b"x-request-id")
        if given is not None and REQUEST_ID.fullmatch(given.decode("latin-1")):
            request.request_id = given.decode("latin-1")
        else:
            request.request_id = f"{self._prefix}{next(self._numbers):016x}"

    def _send(
        self, request: Request, status: int, body: bytes, content_type: bytes, headers: bytes = b""
    ) -> None:
        request.answer(status, body, content_type, self._identify(request) + headers)

    def _refuse(self, request: Request, error: BadRequest) -> None:
        refusal = self._refusal(request, error)
        request.answer(refusal.status, refusal.body, JSON, refusal.headers)

    def _failed(self, request: Request, error: BaseException | None = None) -> None:
        identity = self._identify(request)
        logger.error("request %s failed", request.request_id, exc_info=error or True)
        body = {
            "error": "the prediction failed; the service's log has the request id",
            "request_id": request.request_id,
            "release_id": self.manifest.release_id,
        }
        request.answer(500, msgspec.json.encode(body), JSON, identity)

    def _refusal(self, request: Request, error: BadRequest) -> Refused:
        headers = self._identify(request)
        if error.retry_after_seconds is not None:
            headers += b"retry-after: %d\r\n" % error.retry_after_seconds
        if error.status == 405:
            headers += b"allow: %b\r\n" % str(error.details["expected"]).encode()
        body = {
            "error": error.reason,
            **error.details,
            "request_id": request.request_id,
            "release_id": self.manifest.release_id,
        }
        return Refused(error.status, msgspec.json.encode(body), headers)

    def _count_log(self) -> None:
        """What the log's threads have counted, into the memory that all workers share."""
        counts, own, before = self.log.counts, self.metrics.own, self.metrics.before
        own[LOGGED] = before[LOGGED] + counts.accepted
        own[DROPPED] = before[DROPPED] + counts.dropped
        own[STORED] = before[STORED] + counts.stored
        own[MISFITS] = before[MISFITS] + counts.misfits


def common_headers(manifest: Manifest) -> bytes:
    """Header lines of every answer."""
    return f"{RELEASE_HEADER}: {manifest.release_id}\r\n".encode()


def _fixed(route: str, document: object) -> tuple[int, Callable[[], tuple[int, bytes]]]:
    encoded = msgspec.json.encode(document)
    return ROUTE[route], lambda: (200, encoded)


def _too_large(found: str, limit: int) -> BadRequest:
    return BadRequest(413, f"the body has {found} bytes", found=found, expected=f"at most {limit} bytes")
