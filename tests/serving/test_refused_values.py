"""Values that a schema allows and scikit-learn does not: a 422, whichever way the model is served."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from serving.compiled import read_plan
from tests.serving.in_process import say, served
from tests.serving.toys import (
    PACKAGE,
    ROW,
    Toy,
    compiled_release,
)

FOREST = (
    PACKAGE[: PACKAGE.index("class Model")].replace(
        "from sklearn.linear_model import LogisticRegression",
        "from sklearn.ensemble import RandomForestClassifier",
    )
    + """
class Model:
    def produce_model(self, data):
        self.forest = RandomForestClassifier(5, max_depth=4, random_state=0)
        self.forest.fit(data[["distance", "delay"]], data["late"])

    def predict(self, rows):
        return self.forest.predict_proba(rows[["distance", "delay"]])[:, 1]
"""
)


@pytest.fixture(scope="module")
def forest(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return compiled_release(toy, tmp_path_factory.mktemp("forest"), FOREST)


@pytest.mark.parametrize("path", ["compiled", "original"])
def test_a_value_that_is_too_large_for_a_random_forest_is_refused(
    forest: Toy, tmp_path: Path, path: str
) -> None:
    plan = read_plan(forest.release) if path == "compiled" else None
    assert plan is None or plan.path == "compiled", plan

    async def ask(port: int, rows: list[dict[str, object]]) -> tuple[int, dict[str, object]]:
        body = json.dumps(rows).encode()
        head = b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        reader, writer = await say(port, head % len(body) + body)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])

    async def scenario() -> None:
        async with served(forest, tmp_path, plan) as (app, port, _):
            for value in (1e300, -1e300, 3.5e38):
                good = [ask(port, [ROW]) for _ in range(4)]
                answers = await asyncio.gather(*good, ask(port, [ROW, {**ROW, "delay": value}]))
                assert [status for status, _ in answers] == [200, 200, 200, 200, 422]
                assert "the model cannot take" in str(answers[-1][1]["error"])
            status, answer = await ask(port, [{**ROW, "delay": None}, {**ROW, "delay": 3.4e38}])
            assert status == 200, answer
            assert app.bodies.held == 0

    asyncio.run(scenario())
