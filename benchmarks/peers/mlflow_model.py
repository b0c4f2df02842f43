"""Saves the pipeline as an MLflow model: `python mlflow_model.py PIPELINE FOLDER`.

Without a signature: checking one costs MLflow's server more time on every request.
"""

from __future__ import annotations

import sys

import joblib
import mlflow.sklearn

mlflow.sklearn.save_model(
    joblib.load(sys.argv[1]),
    sys.argv[2],
    pyfunc_predict_fn="predict_proba",
    pip_requirements=["mlflow", "scikit-learn", "pandas"],
    serialization_format="cloudpickle",
)
