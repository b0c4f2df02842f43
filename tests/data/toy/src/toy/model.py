"""A logistic regression over all that is known of a visit."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

NUMBERS = ["amount", "age"]
FLAGS = ["member"]
CATEGORIES = ["colour"]


class Model:
    """P(the visitor buys)."""

    def produce_model(self, data: pd.DataFrame) -> None:
        """Train on visits that have ended."""
        columns = ColumnTransformer(
            [
                ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), NUMBERS),
                ("flags", "passthrough", FLAGS),
                ("categories", OneHotEncoder(handle_unknown="ignore"), CATEGORIES),
            ]
        )
        self.pipeline = Pipeline([("columns", columns), ("regression", LogisticRegression())])
        self.pipeline.fit(data, data["bought"])

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """P(bought) per row."""
        return self.pipeline.predict_proba(rows)[:, 1]
