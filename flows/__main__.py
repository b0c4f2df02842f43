"""`python -m flows`: the process of one run, as the worker starts it: `python -m prefect.engine`, cheaper."""

from __future__ import annotations

import atexit
import gc
import runpy

if __name__ == "__main__":
    # Imports make a million objects that stay to the end: the collector's rounds through them, and its last
    # one at the exit, cost more CPU than most tasks.
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.freeze)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
