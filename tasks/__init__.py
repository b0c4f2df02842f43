"""Prefect's edge: each task a few lines over a plain function of the core."""
