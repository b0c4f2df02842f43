"""In the model's own environment: what the benchmark compares with, and what the peers serve.

    python export.py RELEASE SNAPSHOT OUTPUT

Writes `pipeline.joblib` (the fitted scikit-learn pipeline, as a peer's user would save it) and
`flights.json`: real rows, and what the model says of them in this process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

from serving.artifact import load_model

ROWS = 4000  # spread evenly over the newest rows
NEWEST = 20_000


def main() -> None:
    release, snapshot, output = (Path(argument) for argument in sys.argv[1:])
    sys.path.insert(0, str(release / "site"))
    model: Any = load_model(release / "model", "flights")
    schema = json.loads((release / "schema.json").read_text())
    names = [column["name"] for column in schema["features"]]
    newest = pd.read_parquet(snapshot, columns=names).tail(NEWEST)
    frame = newest.iloc[np.linspace(0, len(newest) - 1, ROWS).astype(int)].reset_index(drop=True)
    found = {
        "rows": [
            {name: None if pd.isna(value) else value for name, value in row.items()}
            for row in frame.to_dict("records")
        ],
        "predictions": [float(value) for value in model.predict(frame)],
    }
    joblib.dump(model.pipeline, output / "pipeline.joblib")
    (output / "flights.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
