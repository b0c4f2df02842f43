"""The model projects in this folder are material for tests; their own tests run in their own builds."""

from __future__ import annotations

collect_ignore = ["toy"]
