"""What a service counts, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class Metrics:
    """Counts of one service; touched from the event loop's thread only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.latencies: dict[str, Histogram] = {}
        self.in_flight = 0
        self.predictions = 0

    def observe(self, route: str, status: int, seconds: float) -> None:
        """One answered request."""
        self.requests[route, status] += 1
        self.latencies.setdefault(route, Histogram()).observe(seconds)

    def text(self, release: str, accepted: int, dropped: int, stored: int) -> str:
        """The exposition, every sample labelled with the release."""
        lines: list[str] = []

        def family(name: str, kind: str, help_: str, samples: list[tuple[str, str, float]]) -> None:
            lines.extend((f"# HELP {name} {help_}", f"# TYPE {name} {kind}"))
            for suffix, labels, value in samples:
                lines.append(f'{name}{suffix}{{release="{release}"{labels}}} {value:.17g}')

        # A 503 of a readiness route is an answer, not an error.
        failed = sum(n for (route, code), n in self.requests.items() if code >= 500 and "ready" not in route)
        family(
            "perennial_requests_total",
            "counter",
            "Requests answered, by route and status code.",
            [
                ("", f',route="{route}",code="{code}"', n)
                for (route, code), n in sorted(self.requests.items())
            ],
        )
        family(
            "perennial_errors_total",
            "counter",
            "Prediction requests answered with a 5xx.",
            [("", "", failed)],
        )
        family(
            "perennial_request_duration_seconds",
            "histogram",
            "From the request's head to the last byte of its answer.",
            [
                sample
                for route, h in sorted(self.latencies.items())
                for sample in h.samples(f',route="{route}"')
            ],
        )
        family(
            "perennial_requests_in_flight",
            "gauge",
            "Prediction requests at work.",
            [("", "", self.in_flight)],
        )
        family("perennial_predictions_total", "counter", "Rows predicted.", [("", "", self.predictions)])
        for name, value, help_ in (
            ("logged", accepted, "Rows accepted by the prediction log."),
            ("dropped", dropped, "Rows that the prediction log had no room for."),
            ("stored", stored, "Rows that the store has."),
        ):
            family(f"perennial_predictions_{name}_total", "counter", help_, [("", "", value)])
        return "\n".join(lines) + "\n"


class Histogram:
    """Latencies in seconds, cumulative as Prometheus wants them."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(LATENCY_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one latency."""
        self.buckets[bisect_left(LATENCY_BOUNDS, seconds)] += 1
        self.sum += seconds

    def samples(self, labels: str) -> list[tuple[str, str, float]]:
        """Suffix, labels and value of each sample."""
        total = 0
        result: list[tuple[str, str, float]] = []
        for bound, count in zip([*map(str, LATENCY_BOUNDS), "+Inf"], self.buckets, strict=True):
            total += count
            result.append(("_bucket", f'{labels},le="{bound}"', total))
        return [*result, ("_sum", labels, self.sum), ("_count", labels, total)]
