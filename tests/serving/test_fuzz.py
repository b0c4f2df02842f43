"""Whatever a client sends, it is the client's fault: never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.toys import ROW, Service

PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
ANYTHING = st.recursive(
    PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
ALMOST_ROW = st.fixed_dictionaries(
    {},
    optional={
        name: st.just(value)
        | PLAIN
        | st.sampled_from(["2013-01-01", "9999-12-31T23:59:59-23:59", 2**63, -0.0])
        for name, value in {**ROW, "id": 1}.items()
    },
).map(lambda row: {**ROW, **row})
BODIES = ANYTHING | ALMOST_ROW | st.lists(ALMOST_ROW) | st.fixed_dictionaries({"rows": st.lists(ALMOST_ROW)})
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*ROW, "id"]) | PLAIN,
        "shape": st.lists(st.integers(0, 3)) | PLAIN,
        "datatype": st.sampled_from(["INT64", "FP64", "BYTES", "BOOL"]) | PLAIN,
        "data": st.lists(PLAIN | st.lists(PLAIN)) | PLAIN,
    },
)
QUICKLY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


@pytest.fixture(params=["service", "compiled_service"])
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    service: Service = request.getfixturevalue(request.param)
    with service.client as client:
        yield client


def post(client: httpx.Client, path: str, body: object) -> httpx.Response:
    try:
        content = msgspec.json.encode(body)
    except UnicodeEncodeError:
        content = repr(body).encode()
    return client.post(path, content=content, headers={"content-type": "application/json"})


@QUICKLY
@given(body=BODIES)
def test_no_json_gives_a_5xx(client: httpx.Client, body: object) -> None:
    answer = post(client, "/predict", body)
    assert answer.status_code in (200, 400, 413, 422), answer.text
    assert answer.status_code == 200 or answer.json()["error"]


@QUICKLY
@given(inputs=st.lists(TENSORS, max_size=3) | ANYTHING)
def test_no_tensors_give_a_5xx(client: httpx.Client, inputs: object) -> None:
    assert post(client, "/v2/models/toy/infer", {"inputs": inputs}).status_code in (200, 400, 413, 422)


@QUICKLY
@given(body=st.binary())
def test_no_bytes_give_a_5xx(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500


@QUICKLY
@given(row=st.fixed_dictionaries({name: st.just(value) for name, value in ROW.items()}), data=st.data())
def test_a_column_given_twice_is_refused_wherever_it_stands(
    client: httpx.Client, row: dict[str, object], data: st.DataObject
) -> None:
    pairs = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in row.items()]
    twice = data.draw(st.sampled_from(sorted(row)))
    other = data.draw(st.sampled_from(["null", "1", "true", json.dumps(ROW[twice]), '"\\u0041"']))
    name = data.draw(st.sampled_from([json.dumps(twice), f'"\\u{ord(twice[0]):04x}{twice[1:]}"']))
    pairs.insert(data.draw(st.integers(0, len(pairs))), f"{name}: {other}")
    body = data.draw(st.sampled_from(["{%s}", "[{%s}]", '{"rows": [{%s}]}'])) % ", ".join(pairs)
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text


@pytest.mark.parametrize("body", [b'{"rows": [], "rows": [%b]}', b'{"rows": [%b], "rows": [%b]}'])
def test_rows_given_twice_are_refused(client: httpx.Client, body: bytes) -> None:
    row = json.dumps(ROW).encode()
    content = body.replace(b"%b", row)
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert "'rows' is given twice" in answer.json()["error"]
