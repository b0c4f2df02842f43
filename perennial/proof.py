"""What a candidate must show before users come, and again while they do: it says what was trained."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec

from perennial import parity
from perennial.errors import RolloutError
from perennial.predictions import CHECK_REQUEST_ID
from perennial.probe import Answer, probe
from perennial.values import Endpoint, ParityReport, Release
from serving import contract

_PREDICT_TIMEOUT_SECONDS = 30.0


def golden_rows(folder: Path) -> contract.Golden:
    """The golden rows of a release directory, as they were predicted in training."""
    return msgspec.json.decode((folder / contract.GOLDEN_FILE).read_bytes(), type=contract.Golden)


def check_parity(endpoint: Endpoint, golden: contract.Golden, release: Release) -> ParityReport:
    """Raises RolloutError when an answer is not what the model said when it was trained."""
    url = f"http://{endpoint.host}:{endpoint.port}"
    began = time.monotonic()
    answered = _ask(f"{url}/predict", {"rows": golden.rows})
    if answered.status != 200:
        raise RolloutError(
            f"{release.release_id} answers its golden rows with {answered.status}: {_shown(answered)}",
            f"{len(golden.rows)} predictions",
        )
    answer = _json(answered, release)
    if answer.get("release_id") != release.release_id:
        raise RolloutError(f"{url} answers for {answer.get('release_id')}", release.release_id)
    parity.check(release, answer.get("predictions"), golden.predictions)
    return ParityReport(
        release_id=release.release_id,
        rows=len(golden.rows),
        tolerance=parity.tolerance_of(release),
        seconds=round(time.monotonic() - began, 4),
    )


def check_manners(endpoint: Endpoint, release: Release) -> None:
    """What must answer answers, and what must be refused is refused. Raises RolloutError."""
    url = f"http://{endpoint.host}:{endpoint.port}"
    status = _ask(f"{url}/predict", {"rows": [{"no_such_column": 1}]}).status
    if not 400 <= status < 500:
        raise RolloutError(f"{release.release_id} answers a wrong row with {status}", "a 4xx with a reason")
    answered = _ask(f"{url}/metadata")
    if answered.status != 200 or release.release_id.encode() not in answered.body:
        raise RolloutError(
            f"{release.release_id}: /metadata answers {answered.status}", "200, naming the release"
        )


def _json(answered: Answer, release: Release) -> dict[str, object]:
    try:
        answer = answered.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RolloutError(
            f"{release.release_id} answers its golden rows with {_shown(answered)}", "a JSON object"
        )
    return answer


def _shown(answered: Answer) -> str:
    return answered.body.decode(errors="replace")[:500]


def _ask(url: str, body: object = None) -> Answer:
    headers = {"content-type": "application/json", "x-request-id": CHECK_REQUEST_ID}
    data = None if body is None else json.dumps(body).encode()
    answered = probe(url, data=data, headers=headers, timeout_seconds=_PREDICT_TIMEOUT_SECONDS)
    if answered is None:
        raise RolloutError(f"{url} does not answer", f"an answer within {_PREDICT_TIMEOUT_SECONDS:g} s")
    return answered
