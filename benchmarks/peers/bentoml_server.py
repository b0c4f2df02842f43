"""BentoML's service class, one worker per CPU. MODEL names the joblib file."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import joblib
import pandas as pd


@bentoml.service(workers=os.cpu_count() or 1)
class Flights:
    def __init__(self) -> None:
        self.model = joblib.load(os.environ["MODEL"])

    @bentoml.api
    def predict(self, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
        return {"predictions": self.model.predict_proba(pd.DataFrame(rows))[:, 1].tolist()}
