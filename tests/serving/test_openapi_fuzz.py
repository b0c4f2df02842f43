"""schemathesis, from the service's own OpenAPI document, against both ways of serving a model."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode

from tests.serving.toys import Service

EXAMPLES = {GenerationMode.POSITIVE: 12, GenerationMode.NEGATIVE: 40}


@pytest.mark.parametrize("served", ["service", "compiled_service"])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_the_openapi_document_says(
    request: pytest.FixtureRequest, served: str, mode: GenerationMode
) -> None:
    """No 5xx, no undocumented status or body; what fits the schema is taken, what does not is refused."""
    service: Service = request.getfixturevalue(served)
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    seen: set[int] = set()
    operations = [result.ok() for result in document.get_all_operations()]
    assert "POST /predict" in {operation.label for operation in operations}

    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            continue  # nothing in it can be wrong

        @settings(
            max_examples=EXAMPLES[mode],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            answer = case.call()
            seen.add(answer.status_code)
            # What JSON Schema cannot say: date-time has years that pandas has not, and bodies have a limit.
            assume(answer.status_code != 413)
            assume(mode is GenerationMode.NEGATIVE or "column 'planned'" not in answer.text)
            case.validate_response(answer)

        ask()
    assert 200 in seen if mode is GenerationMode.POSITIVE else seen & {400, 422}
