"""Where a canary's numbers come from: Envoy counts requests and failures, the service its latencies.

Envoy's `rq_error` of an endpoint grows by one for each try that ended in a 5xx, a reset, a timeout or a
refused connection; `rq_total` lacks the refused ones, so requests are `rq_success` + `rq_error`. A 4xx is
a success there. A request whose client left is neither; the service still counts how long it took.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from perennial.canary import Arm, Baseline, Count, Look
from perennial.predictions import Recent
from perennial.probe import probe
from perennial.router import cluster_name
from perennial.settings import Settings
from perennial.values import Endpoint, JsonObject, Value

PREDICTION_ROUTES = ("/predict", "/v2/models/{name}/infer")
_NOT_REFUSALS = (
    408,
    499,
)  # slow to send, gone before the answer: the client's doing, and no fault of the rows

_QUANTILES = (0.5, 0.9, 0.99)
_DECILES = np.linspace(0.1, 0.9, 9)
_LEAST_PAST = 20  # requests; of fewer, nothing is known about what is usual

_SAMPLE = re.compile(r"^(perennial_request\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Counters(Value):
    """What had happened to one endpoint up to a moment, or between two (`difference`)."""

    requests: Count = 0  # tries: what fails in one release is asked again of the other
    errors: Count = 0  # of them failed
    retries: Count = 0  # of the whole service: tries that were not a request's first
    rescued: Count = 0  # of the whole service: requests that a retry answered well
    told: bool = False  # whether the service said what follows
    # Prediction requests that the service answered in at most so many seconds each, and longer than the bound
    # before; the last bucket is of those beyond all bounds. Without any request there are no buckets.
    bounds_seconds: tuple[float, ...] = ()
    buckets: tuple[Count, ...] = ()
    refused: Count = 0  # of those, with a 4xx


def read(settings: Settings, environment: str, project: str, endpoint: Endpoint) -> Counters | None:
    """The counters of an endpoint of a service; None when Envoy's admin address does not answer.

    Zeros, as far as Envoy counts, of an endpoint that it does not have.
    """
    clusters = probe(f"{settings.router_admin_url}/clusters?format=json")
    pattern = rf"^cluster\.{re.escape(cluster_name(environment, project))}\.upstream_rq_retry(_success)?$"
    retries = probe(f"{settings.router_admin_url}/stats?format=json&filter={quote(pattern)}")
    if clusters is None or retries is None or (clusters.status, retries.status) != (200, 200):
        return None
    succeeded = failed = 0
    for counted in _hosts(clusters.json(), endpoint):
        succeeded += counted.get("rq_success", 0)
        failed += counted.get("rq_error", 0)
    again = {
        stat["name"].rpartition(".")[2]: stat["value"] for stat in retries.json()["stats"] if "name" in stat
    }
    return Counters(
        requests=succeeded + failed,
        errors=failed,
        retries=again.get("upstream_rq_retry", 0),
        rescued=again.get("upstream_rq_retry_success", 0),
        **_of_service(endpoint),
    )


def difference(before: Counters, after: Counters) -> Counters:
    """What happened in between. A counter that went down began anew: all of it happened since."""
    requests, errors = _grown((before.requests, before.errors), (after.requests, after.errors))
    retries, rescued = _grown((before.retries, before.rescued), (after.retries, after.rescued))
    between = Counters(requests=requests, errors=errors, retries=retries, rescued=rescued)
    if not (before.told and after.told):
        return between
    past = before.buckets or (0,) * len(after.buckets)
    refused, *buckets = _grown((before.refused, *past), (after.refused, *after.buckets))
    service = {"bounds_seconds": after.bounds_seconds, "buckets": tuple(buckets), "refused": refused}
    return between.model_copy(update={"told": True, **service})


def arm(
    before: Counters | None, after: Counters | None, baseline: Baseline, predictions: Recent | None = None
) -> Arm:
    """One release between two readings; one that failed makes it as if nobody had asked."""
    counted = difference(before, after) if before and after else Counters()
    timed = sum(counted.buckets)
    known = set(baseline.latency_seconds) <= set(counted.bounds_seconds)
    return Arm(
        requests=counted.requests,
        errors=counted.errors,
        timed=timed if counted.told else None,
        refused=min(counted.refused, timed),
        slow=tuple(_slower(counted, bound) for bound in baseline.latency_seconds)
        if counted.buckets and known
        else (),
        predictions=() if predictions is None else bin_counts(predictions, baseline),
    )


def look(
    before: Sequence[Counters | None],
    after: Sequence[Counters | None],
    baseline: Baseline,
    predictions: Sequence[Recent | None] = (None, None),
) -> Look:
    """Both arms between two readings; each argument is of the candidate and of the active release."""
    candidate, active = (
        arm(old, new, baseline, logged) for old, new, logged in zip(before, after, predictions, strict=True)
    )
    both = [difference(old, new) for old, new in zip(before, after, strict=True) if old and new]
    # One counter for both, read twice.
    retries = max((counted.retries for counted in both), default=0)
    rescued = max((counted.rescued for counted in both), default=0)
    return Look(candidate=candidate, active=active, retries=retries, rescued=min(rescued, retries))


def baseline(active: Counters | None, predictions: Recent | None = None) -> Baseline:
    """What is usual, from the counters of the active release and its logged predictions.

    Latency thresholds are the bounds of the service's own buckets next above its median, p90 and p99: what
    happens within a bucket is not seen. Prediction bins are the past's deciles, one below it and one above.
    """
    counters = active or Counters()
    timed = sum(counters.buckets)
    shares = {bound: _slower(counters, bound) / timed for bound in counters.bounds_seconds if timed}
    thresholds = [
        next((bound for bound, share in shares.items() if share <= 1 - quantile), None)
        for quantile in _QUANTILES
    ]
    latency = sorted({bound for bound in thresholds if bound is not None}) if timed >= _LEAST_PAST else []
    values = np.empty(0) if predictions is None else _one_per_request(predictions)
    values = values[np.isfinite(values)]
    edges: set[float] = set()
    if len(values) >= _LEAST_PAST:
        low, high = values.min(), values.max()
        edges = {float(np.nextafter(low, -math.inf)), *map(float, np.quantile(values, _DECILES)), float(high)}
    return Baseline(
        requests=counters.requests,
        errors=counters.errors,
        latency_seconds=tuple(latency),
        slow_shares=tuple(shares[bound] for bound in latency),
        prediction_edges=tuple(sorted(edges)),
    )


def bin_counts(predictions: Recent, baseline: Baseline) -> tuple[int, ...]:
    """How many requests' predictions lie in each of the baseline's bins: one per request, its first row's.

    The rows of a request are of one client and one moment; to count them all would be to count it often.
    """
    if not baseline.bins:
        return ()
    values = _one_per_request(predictions)
    bins = np.searchsorted(np.array(baseline.prediction_edges), values, side="left")
    bins[np.isnan(values)] = baseline.bins - 1
    return tuple(int(count) for count in np.bincount(bins, minlength=baseline.bins))


def _one_per_request(predictions: Recent) -> NDArray[np.float64]:
    first: NDArray[np.float64] = predictions.predictions[predictions.rows == 0]
    return first


def _slower(counters: Counters, bound: float) -> int:
    return sum(counters.buckets[counters.bounds_seconds.index(bound) + 1 :])


def _grown(before: Sequence[int], after: Sequence[int]) -> list[int]:
    if len(before) != len(after) or any(new < old for old, new in zip(before, after, strict=True)):
        return list(after)
    return [new - old for old, new in zip(before, after, strict=True)]


def _hosts(clusters: JsonObject, endpoint: Endpoint) -> Iterator[dict[str, int]]:
    """Envoy's counts of the endpoint in every cluster that has it: a shadow is in one of its own."""
    for cluster in clusters.get("cluster_statuses", []):
        for host in cluster.get("host_statuses", []):
            address = host["address"].get("socket_address", {})
            if (address.get("address"), address.get("port_value")) == (endpoint.host, endpoint.port):
                yield {stat["name"]: int(stat.get("value", 0)) for stat in host.get("stats", [])}


def _of_service(endpoint: Endpoint) -> JsonObject:
    """Fields of `Counters` that the service's own /metrics tell; none where it has no such thing."""
    answer = probe(f"http://{endpoint.host}:{endpoint.port}/metrics")
    if answer is None or answer.status != 200:
        return {}
    up_to: dict[float, int] = {}
    refused = 0
    samples = _SAMPLE.findall(answer.body.decode(errors="replace"))
    for name, label_text, value in samples:
        labels = dict(_LABEL.findall(label_text))
        if labels.get("route") not in PREDICTION_ROUTES:
            continue
        if name == "perennial_request_duration_seconds_bucket":
            up_to[float(labels["le"])] = up_to.get(float(labels["le"]), 0) + int(float(value))
        elif name == "perennial_requests_total":
            code = int(labels["code"])
            refused += int(float(value)) * (400 <= code < 500 and code not in _NOT_REFUSALS)
    bounds = sorted(up_to)
    counts = np.diff([up_to[bound] for bound in bounds], prepend=0)
    return {
        "told": bool(samples),
        "bounds_seconds": tuple(bound for bound in bounds if math.isfinite(bound)),
        "buckets": tuple(max(int(count), 0) for count in counts),
        "refused": refused,
    }
