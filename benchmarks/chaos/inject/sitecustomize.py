"""Read by Python at its start where PYTHONPATH names this folder: a run stops at a write to the journal.

PERENNIAL_BENCH_STOP names a folder, PERENNIAL_BENCH_KIND the kind of the decision after which the first run
to come there writes its process id to `stopped` and waits for `go`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from perennial.journal import Journal

_FOLDER = Path(os.environ["PERENNIAL_BENCH_STOP"])
_KIND = os.environ["PERENNIAL_BENCH_KIND"]
_really = Journal.decide


def _decide(journal: Journal, **decision: Any) -> int:
    position = _really(journal, **decision)
    stopped = _FOLDER / "stopped"
    if decision["kind"] == _KIND and not stopped.exists():
        (_FOLDER / "new").write_text(str(os.getpid()))
        (_FOLDER / "new").rename(stopped)
        while not (_FOLDER / "go").exists():
            time.sleep(0.02)
    return position


Journal.decide = _decide
