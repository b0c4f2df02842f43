"""FastAPI as its documentation writes it: a pydantic model per row, a plain `def`, a DataFrame.

Run by uvicorn, one worker per CPU. MODEL names the joblib file, SCHEMA the release's schema.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import joblib
import pandas as pd
from fastapi import FastAPI
from pydantic import BaseModel, create_model

TYPES = {"integer": int, "number": float, "string": str, "boolean": bool}
FEATURES = json.loads(Path(os.environ["SCHEMA"]).read_text())["features"]
# A user writes this class by hand; it is the same for pydantic.
Row = create_model(
    "Row",
    **{
        column["name"]: (TYPES[column["type"]] | None, None)
        if column["nullable"]
        else (TYPES[column["type"]], ...)
        for column in FEATURES
    },
)


class Rows(BaseModel):
    rows: list[Row]  # type: ignore[valid-type]


model = joblib.load(os.environ["MODEL"])
app = FastAPI()


@app.post("/predict")
def predict(body: Rows) -> dict[str, list[float]]:
    frame = pd.DataFrame([row.model_dump() for row in body.rows])
    return {"predictions": model.predict_proba(frame)[:, 1].tolist()}


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}
