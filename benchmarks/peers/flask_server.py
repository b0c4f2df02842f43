"""Flask as most write it: JSON to a DataFrame to the pipeline. MODEL names the joblib file."""

from __future__ import annotations

import os

import joblib
import pandas as pd
from flask import Flask, jsonify, request

model = joblib.load(os.environ["MODEL"])
app = Flask(__name__)


@app.post("/predict")
def predict():
    frame = pd.DataFrame(request.get_json()["rows"])
    return jsonify(predictions=model.predict_proba(frame)[:, 1].tolist())


@app.get("/health")
def health():
    return jsonify(status="ok")
