"""Every few minutes: what serves is what the journal says, and nothing lies about that nothing needs."""

from __future__ import annotations

from prefect import flow

from tasks import edge
from tasks.tend import check_probation, end_expired, reconcile_services, remove_leftovers, report_changes


@flow(flow_run_name="tend", persist_result=False)
@edge.explained
def tend() -> None:
    """Bring router and services to the journal, look at releases on probation, remove leftovers."""
    reconciled = reconcile_services()
    taken_back = check_probation()
    expired = end_expired()
    removed = remove_leftovers()
    report_changes(reconciled, taken_back, expired, removed)
