"""What a real server says to good and bad requests."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serving.decode import decode_json
from serving.errors import BadRequest
from tests.serving.toys import RELEASE_ID, ROW, Service, Toy


def changed(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ROW.items() if key != name}


def test_golden_rows_served_in_one_request_give_bit_equal_predictions(toy: Toy, client: httpx.Client) -> None:
    golden = json.loads((toy.release / "golden.json").read_text())
    assert len(golden["rows"]) >= 20
    assert any(None in row.values() for row in golden["rows"])
    answer = client.post("/predict", json={"rows": golden["rows"]}).json()
    assert answer["predictions"] == golden["predictions"]
    assert set(answer) == {"release_id", "request_id", "predictions"}


@pytest.mark.parametrize(
    "body", [{"rows": [ROW]}, [ROW], ROW, {"rows": [changed(id=4)]}, changed(distance=1200.0)]
)
def test_rows_in_an_envelope_an_array_or_alone_are_predicted(client: httpx.Client, body: Any) -> None:
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"] == client.post("/predict", json=ROW).json()["predictions"]


WRONG_ROWS = [
    (changed(distanse=1) | {"x": 0}, "distanse", "distance", "columns"),
    (changed(delays=1.0), "delays", "delay", "columns"),
    (without("carrier"), "carrier", None, "a string"),
    (changed(distance="far"), "distance", None, "an integer"),
    (changed(distance=True), "distance", None, "an integer"),
    (changed(distance=1.5), "distance", None, "an integer"),
    (changed(distance=2**63), "distance", None, "64 bits"),
    (changed(distance=10**400), "distance", None, "64 bits"),
    (changed(distance=None), "distance", None, "an integer"),
    (changed(delay="3"), "delay", None, "a number or null"),
    (changed(delay=False), "delay", None, "a number or null"),
    (changed(delay=10**400), "delay", None, "a number or null"),
    (changed(carrier=4), "carrier", None, "a string"),
    (changed(carrier=None), "carrier", None, "a string"),
    (changed(carrier=["UA"]), "carrier", None, "a string"),
    (changed(weekend=0), "weekend", None, "true or false"),
    (changed(weekend="true"), "weekend", None, "true or false"),
    (changed(hour=7.25), "hour", None, "an integer of 64 bits or null"),
    (changed(planned="tomorrow"), "planned", None, "ISO 8601"),
    (changed(planned="2013-01-05T07:00:00"), "planned", None, "with an offset"),
    (changed(planned="0001-01-01T00:00:00+23:00"), "planned", None, "ISO 8601"),
    (changed(planned="3000-01-01T00:00:00Z"), "planned", None, "ISO 8601"),
    (changed(planned=20130105), "planned", None, "ISO 8601"),
    (changed(id="one"), "id", None, "an integer"),
]


@pytest.mark.parametrize(("row", "column", "nearest", "expected"), WRONG_ROWS)
def test_a_wrong_row_is_refused_with_its_index_its_column_and_what_was_expected(
    client: httpx.Client, row: dict[str, Any], column: str, nearest: str | None, expected: str
) -> None:
    answer = client.post("/predict", json={"rows": [ROW, row]})
    error = answer.json()
    assert answer.status_code == 422, answer.text
    assert (error["row"], error["column"], error.get("nearest")) == (1, column, nearest)
    assert expected in error["expected"]
    assert column in error["error"]
    assert error["found"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b'{"rows": [{"delay": NaN}]}', 400, "not JSON"),
        (b'{"rows": [{"delay": Infinity}]}', 400, "not JSON"),
        (b'{"rows": [{"delay": 1e999}]}', 400, "not JSON"),
        (b'"\xff"', 400, "not JSON"),
        (b'"\\ud800"', 400, "not JSON"),
        (b"[" * 15_000, 400, "not JSON"),
        (b"7", 422, "plain value"),
        (b"null", 422, "plain value"),
        (b"[]", 422, "0 rows"),
        (b'{"rows": []}', 422, "0 rows"),
        (b'{"rows": {}}', 422, "not an array"),
        (b'{"rows": [], "other": 1}', 422, "'other'"),
        (b"[1]", 422, "row 0 is the number 1"),
        (b"[[]]", 422, "row 0 is an array"),
        (b"{}", 422, "no column"),
        (b"[" + b",".join([b"{}"] * 51) + b"]", 422, "51 rows, expected 1 to 50"),
    ],
)
def test_a_body_that_is_not_rows_is_refused(
    client: httpx.Client, body: bytes, status: int, reason: str
) -> None:
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/csv"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_another_content_type_is_refused(client: httpx.Client, headers: dict[str, str]) -> None:
    answer = client.post("/predict", content=json.dumps(ROW), headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["expected"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_by_another_spelling_is_taken(client: httpx.Client, content_type: str) -> None:
    answer = client.post("/predict", content=json.dumps(ROW), headers={"content-type": content_type})
    assert answer.status_code == 200


def test_an_oversized_body_is_refused_by_its_announced_length(client: httpx.Client) -> None:
    answer = client.post("/predict", content=b" " * 20_001, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["expected"] == "at most 20000 bytes"
    assert client.post("/predict", json=ROW).status_code == 200


def test_an_oversized_body_is_refused_while_it_streams(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    answer = client.post("/predict", content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert "more than 20000" in answer.json()["error"]


def test_a_client_that_waits_for_leave_to_send_too_much_is_refused_at_once(service: Service) -> None:
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=5) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"expect: 100-continue\r\ncontent-length: 999999\r\n\r\n"
        )
        answer = b""
        while chunk := connection.recv(65536):  # the server closes: nobody knows whether the body comes
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/toy/versions/other", 404),
        ("GET", "/v2/models/toy/nothing", 404),
        ("GET", "/predict", 405),
        ("DELETE", "/predict", 405),
        ("POST", "/metadata", 405),
        ("PUT", "/health/live", 405),
        ("GET", "/v2/models/toy/infer", 405),
    ],
)
def test_a_wrong_path_or_method_gets_a_reason(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert (status == 405) == ("allow" in answer.headers)


def test_every_answer_names_the_release_and_the_request(client: httpx.Client) -> None:
    for method, path in (("GET", "/health/live"), ("GET", "/metrics"), ("GET", "/x"), ("POST", "/predict")):
        answer = client.request(method, path)
        assert answer.headers["x-perennial-release"] == RELEASE_ID
        assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-1.2:3_4", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ('a"', False)],
)
def test_a_clients_request_id_is_kept_when_it_is_short_and_safe(
    client: httpx.Client, given: str, taken: bool
) -> None:
    answer = client.post("/predict", json=ROW, headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is taken
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_health_metadata_and_metrics_answer(client: httpx.Client) -> None:
    client.post("/predict", json=[ROW, ROW])
    client.post("/predict", json=changed(carrier=1))
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}
    assert client.head("/health/ready").status_code == 200
    metadata = client.get("/metadata").json()
    assert metadata["manifest"]["release_id"] == RELEASE_ID
    assert {"name": "hour", "type": "integer", "nullable": True, "utc": False} in metadata["schema"][
        "features"
    ]
    time.sleep(1.1)  # the log's counts of the other workers are brought together every second
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    label = f'release="{RELEASE_ID}"'
    assert float(samples[f'perennial_requests_total{{{label},route="/predict",code="422"}}']) >= 1
    assert float(samples[f"perennial_predictions_total{{{label}}}"]) >= 2
    assert (
        samples[f"perennial_predictions_logged_total{{{label}}}"]
        == samples[f"perennial_predictions_total{{{label}}}"]
    )
    assert samples[f"perennial_predictions_dropped_total{{{label}}}"] == "0"
    assert samples[f"perennial_requests_in_flight{{{label}}}"] == "0"
    count = samples[f'perennial_request_duration_seconds_count{{{label},route="/predict"}}']
    assert (
        count == samples[f'perennial_request_duration_seconds_bucket{{{label},route="/predict",le="+Inf"}}']
    )


def test_every_sample_of_metrics_has_a_type_and_the_release(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    typed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    for line in text.splitlines():
        if not line.startswith("#"):
            name = line.partition("{")[0]
            assert name in typed or name.rpartition("_")[0] in typed
            assert f'release="{RELEASE_ID}"' in line


def test_openapi_describes_the_releases_columns(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == RELEASE_ID
    row = document["components"]["schemas"]["Row"]
    assert set(row["required"]) == set(ROW)
    assert row["additionalProperties"] is False
    assert row["properties"]["hour"]["type"] == ["integer", "null"]
    assert row["properties"]["carrier"]["type"] == "string"
    assert row["properties"]["planned"]["format"] == "date-time"
    assert "id" in row["properties"]
    schemas = document["components"]["schemas"]
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    for path in ("/predict", "/metadata", "/health/live", "/health/ready"):
        for operation in document["paths"][path].values():
            assert operation["operationId"]
            assert all("description" in response for response in operation["responses"].values())


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for child in part.values():
            yield from _references(child)
    elif isinstance(part, list):
        for child in part:
            yield from _references(child)


def test_the_open_inference_protocol_answers(client: httpx.Client) -> None:
    assert client.get("/v2").json()["name"] == "perennial-serving"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for model in ("/v2/models/toy", f"/v2/models/toy/versions/{RELEASE_ID}"):
        metadata = client.get(model).json()
        assert metadata["versions"] == [RELEASE_ID]
        assert {"name": "carrier", "datatype": "BYTES", "shape": [-1]} in metadata["inputs"]
        assert metadata["outputs"] == [{"name": "prediction", "datatype": "FP64", "shape": [-1]}]
        assert client.get(f"{model}/ready").json()["ready"] is True


def tensors(**changes: Any) -> list[dict[str, Any]]:
    datatypes = {"carrier": "BYTES", "planned": "BYTES", "weekend": "BOOL", "delay": "FP64"}
    return [
        {"name": name, "shape": [2], "datatype": datatypes.get(name, "INT64"), "data": [value, value]}
        | changes.get(name, {})
        for name, value in ROW.items()
    ]


@pytest.mark.parametrize("shape", [{}, {"shape": [2, 1]}, {"shape": [2, 1], "data": [[1200], [1200]]}])
def test_tensors_give_the_predictions_of_their_rows(client: httpx.Client, shape: dict[str, Any]) -> None:
    body = {"id": "mine", "inputs": tensors(distance=shape)}
    answer = client.post("/v2/models/toy/infer", json=body)
    assert answer.status_code == 200, answer.text
    expected = client.post("/predict", json=[ROW, ROW]).json()["predictions"]
    output = {"name": "prediction", "datatype": "FP64", "shape": [2], "data": expected}
    assert answer.json() == {
        "model_name": "toy",
        "model_version": RELEASE_ID,
        "id": "mine",
        "outputs": [output],
    }


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (None, "no inputs"),
        ([], "no inputs"),
        ([1], "not an object"),
        ([{"shape": [1]}], "no name"),
        (tensors(distance={"datatype": "BYTES"}), "expected INT64"),
        (tensors(distance={"datatype": ["INT64"]}), "expected INT64"),
        (tensors(distance={"shape": [3]}), "expected shape [2]"),
        (tensors(distance={"shape": "2"}), "expected shape [2]"),
        (tensors(distance={"data": 4}), "no data"),
        (tensors(distance={"shape": [1], "data": [1]}), "expected 1 like"),
        (tensors(distance={"data": [1, "x"]}), "row 1, column 'distance'"),
        (tensors()[1:], "no column 'distance'"),
        ([*tensors(), tensors()[0]], "given twice"),
        ([*tensors(), tensors()[0] | {"name": "distanze"}], "did you mean 'distance'"),
        ([{"name": "distance", "shape": [0], "datatype": "INT64", "data": []}], "0 rows"),
    ],
)
def test_wrong_tensors_are_refused(client: httpx.Client, inputs: Any, reason: str) -> None:
    answer = client.post("/v2/models/toy/infer", json={"inputs": inputs})
    assert answer.status_code == 422, answer.text
    assert reason in answer.json()["error"]


def test_too_many_tensor_values_are_refused_before_they_become_rows(client: httpx.Client) -> None:
    many = 2000  # the service takes 50 rows, and 20,000 bytes
    inputs = [{"name": "distance", "shape": [many], "datatype": "INT64", "data": [1] * many}]
    answer = client.post("/v2/models/toy/infer", json={"inputs": inputs})
    assert answer.status_code == 422
    assert f"{many} rows, expected 1 to" in answer.text


def test_a_column_name_as_long_as_a_body_may_be_is_refused_at_once_and_not_repeated(
    client: httpx.Client,
) -> None:
    answer = client.post("/predict", json={"rows": [{"x" * 19_000: 1}]})
    assert answer.status_code == 422
    assert len(answer.content) < 2_000


def test_tensors_of_many_unknown_columns_are_refused_without_repeating_a_long_name(
    client: httpx.Client,
) -> None:
    unknown = {"shape": [2], "datatype": "INT64", "data": [1, 2]}
    many = [unknown | {"name": f"x{number}"} for number in range(100)]
    answer = client.post("/v2/models/toy/infer", json={"inputs": [*tensors(), *many]})
    assert answer.status_code == 422
    assert (answer.json()["row"], answer.json()["column"]) == (0, "x0")

    twice = [unknown | {"name": "x" * 5000}] * 2
    answer = client.post("/v2/models/toy/infer", json={"inputs": twice})
    assert "given twice" in answer.json()["error"]
    assert len(answer.content) < 1000


def test_a_name_given_twice_among_very_many_is_found_at_once() -> None:
    """In one pass: looked for name by name, it would take half a minute."""
    names = ",".join(f'"a{number}":1' for number in range(60_000))
    started = time.monotonic()
    with pytest.raises(BadRequest, match="'z' is given twice"):
        decode_json(f'{{{names},"z":1,"z":2}}'.encode())
    assert time.monotonic() - started < 5
