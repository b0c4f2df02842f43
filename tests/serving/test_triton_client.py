"""A client of the Open Inference Protocol that we did not write, as it is."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.serving.toys import RELEASE_ID, ROW, Service

ROWS = [ROW, {**ROW, "distance": 300, "carrier": "Ünknown \U0001f6eb", "weekend": True, "delay": -1.5}]
NUMPY = {"distance": np.int64, "delay": np.float64, "weekend": np.bool_, "hour": np.int64}


@pytest.fixture(params=["service", "compiled_service"])
def served(request: pytest.FixtureRequest) -> Service:
    service: Service = request.getfixturevalue(request.param)
    return service


@pytest.fixture
def client(served: Service) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(urlsplit(served.url).netloc)


def inputs(binary: bool, rows: list[dict[str, Any]] = ROWS, **dtypes: Any) -> list[triton.InferInput]:
    given = []
    for name in ROW:
        values = [row[name] for row in rows]
        dtype = dtypes.get(name, NUMPY.get(name, np.object_))
        array = np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=dtype)
        tensor = triton.InferInput(name, [len(rows)], np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, binary_data=binary)
        given.append(tensor)
    return given


def expected(served: Service, rows: list[dict[str, Any]] = ROWS) -> list[float]:
    answer = httpx.post(f"{served.url}/predict", json={"rows": rows})
    predictions: list[float] = answer.json()["predictions"]
    return predictions


def test_the_server_and_its_model_are_live_ready_and_described(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("toy") and client.is_model_ready("toy", RELEASE_ID)
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert [tensor["name"] for tensor in client.get_model_metadata("toy")["inputs"]] == list(ROW)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_tensors_in_and_out_are_those_of_predict(
    client: triton.InferenceServerClient, served: Service, binary_in: bool, binary_out: bool | None
) -> None:
    wanted = None
    if binary_out is not None:
        wanted = [triton.InferRequestedOutput("prediction", binary_data=binary_out)]
    result = client.infer("toy", inputs(binary_in), outputs=wanted, request_id="mine")
    assert result.as_numpy("prediction").tolist() == expected(served)
    assert result.get_response()["id"] == "mine"
    assert result.get_response()["model_version"] == RELEASE_ID


def test_smaller_numbers_and_two_dimensions_are_taken(
    client: triton.InferenceServerClient, served: Service
) -> None:
    small = inputs(True, distance=np.int32, delay=np.float32, hour=np.uint8)
    assert client.infer("toy", small).as_numpy("prediction").tolist() == expected(served)


def test_a_nan_of_a_binary_tensor_is_null(client: triton.InferenceServerClient, served: Service) -> None:
    rows = [{**ROW, "delay": np.nan}]
    result = client.infer("toy", inputs(True, rows))
    assert result.as_numpy("prediction").tolist() == expected(served, [{**ROW, "delay": None}])


def test_several_requests_at_once_are_told_apart(
    client: triton.InferenceServerClient, served: Service
) -> None:
    many = triton.InferenceServerClient(urlsplit(served.url).netloc, concurrency=8)
    one, two = expected(served)
    asked = [many.async_infer("toy", inputs(True, [ROWS[number % 2]])) for number in range(40)]
    answers = [result.get_result().as_numpy("prediction").tolist() for result in asked]
    assert answers == [[one], [two]] * 20


def test_errors_reach_the_client_in_words(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no column 'planned'"):
        client.infer("toy", inputs(True)[:-1])
    with pytest.raises(InferenceServerException, match="no model 'other'"):
        client.infer("other", inputs(True))
    with pytest.raises(InferenceServerException, match="no output 'other'"):
        client.infer("toy", inputs(True), outputs=[triton.InferRequestedOutput("other")])
    wrong = inputs(True)
    wrong[2] = triton.InferInput("carrier", [2], "BYTES")
    wrong[2].set_data_from_numpy(np.array([b"\xff", b"UA"], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="not UTF-8"):
        client.infer("toy", wrong)
