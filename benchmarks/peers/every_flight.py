"""In the model's own environment: every flight of 2013, by the original and as our server answers it.

    python every_flight.py RELEASE

Those that never arrived, and those of the last day, are among them: no training has them, and a service may
be asked for any. Each row goes the way of a request: JSON, the server's decoder, the compiled model. Prints
the number of rows and the largest absolute difference, as JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from serving.artifact import load_model
from serving.compiled import read_plan
from serving.decode import Decoder
from serving.frames import from_table, json_rows
from serving.models import load
from serving.release import read_schema

FLIGHTS_OF_2013 = 336_776
PIECE = 1000  # rows of a request


def main() -> None:
    release = Path(sys.argv[1])
    sys.path.insert(0, str(release / "site"))
    schema, plan = read_schema(release), read_plan(release)
    frame = every_flight()
    assert len(frame) == FLIGHTS_OF_2013, len(frame)
    original: Any = load_model(release / "model", "flights")
    decoder = Decoder(schema, plan)
    served = load(release, plan, decoder)
    table = pa.Table.from_pandas(frame[[feature.name for feature in schema.features]], preserve_index=False)
    said = original.predict(from_table(table, schema.features))
    answers: list[float] = []
    for start in range(0, len(frame), PIECE):
        body = msgspec.json.encode({"rows": json_rows(table.slice(start, PIECE))})
        answers += served.predict(decoder.rows(body, PIECE))[0]
    apart = float(np.abs(np.array(answers) - said).max())
    print(json.dumps({"rows": len(answers), "max_abs_difference": apart}))


def every_flight() -> pd.DataFrame:
    """What `load_data` makes of the whole year, as if every flight had arrived in time."""
    from flights import data

    read = data._read

    def with_all(name: str, columns: dict[str, str]) -> pd.DataFrame:
        found = read(name, columns)
        return found.fillna({"arr_delay": 0.0}) if "arr_delay" in found else found

    data._read = with_all
    data._replayed = lambda as_of: pd.Timestamp(2014, 1, 1)
    return data.load_data(date(2013, 12, 31))


if __name__ == "__main__":
    main()
