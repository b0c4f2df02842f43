"""Gradient-boosted trees over what is known of a flight before it departs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OrdinalEncoder

TARGET = "late"
CATEGORIES = ["carrier", "origin", "dest", "manufacturer"]
NUMBERS = [
    "distance",
    "weekday",
    "hour",
    "minute",
    "duration_minutes",
    "late_share_origin_1d",
    "late_share_carrier_7d",
    "late_share_dest_7d",
    "plane_age",
    "seats",
    "temp",
    "dewp",
    "humid",
    "wind_dir",
    "wind_speed",
    "wind_gust",
    "precip",
    "pressure",
    "visib",
]


class Model:
    """P(a flight arrives more than 15 minutes late)."""

    def produce_model(self, data: pd.DataFrame) -> None:
        """Train on past flights: the columns of `load_data`, any number of rows with both outcomes."""
        encode = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan)
        columns = ColumnTransformer([("categories", encode, CATEGORIES), ("numbers", "passthrough", NUMBERS)])
        trees = HistGradientBoostingClassifier(
            categorical_features=list(range(len(CATEGORIES))),
            learning_rate=0.03,  # small, smooth steps: a day more of data must not turn the model over
            max_iter=150,
            max_leaf_nodes=16,
            max_features=0.3,
            min_samples_leaf=300,
            l2_regularization=50.0,
            early_stopping=False,
            random_state=0,
        )
        self.pipeline = Pipeline([("columns", columns), ("trees", trees)])
        self.pipeline.fit(data, data[TARGET])

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """P(late) per row, float64; unseen categories and nulls are what the trees call missing."""
        return self.pipeline.predict_proba(rows)[:, 1]
