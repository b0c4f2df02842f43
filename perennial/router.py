"""The router: Envoy, configured by files that it watches. The files are a pure function of the routes.

A switch from an old release to a new one loses no request when it is done in this order:

1. `write` the old endpoint and the new one, `wait_applied`: Envoy's own health checks have seen the new one;
2. `write` the new endpoint alone, `wait_applied`: no new request goes to the old one, those it is still
   answering go on;
3. stop the old process, which finishes what it has (`targets.ProcessTarget.stop`).

Each step may be repeated, and a step left out (1) costs at most a retry inside Envoy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perennial.errors import RolloutError
from perennial.probe import probe
from perennial.settings import Settings
from perennial.values import Endpoint, JsonObject

Routes = Mapping[str, Mapping[str, Sequence[Endpoint]]]
"""Environment → service → its endpoints: those that share the traffic by weight, standbys, a shadow."""

LISTENERS_FILE = "listeners.json"
CLUSTERS_FILE = "clusters.json"

# Above the largest body that a service takes by default (8 MiB), so that every request can be retried.
_RETRY_BUFFER_BYTES = 9 * 1024 * 1024
_POLL_SECONDS = 0.02
_LOCK_SECONDS = 60.0

_TYPE = "type.googleapis.com/"
_API = f"{_TYPE}envoy.config"
_EXTENSION = f"{_TYPE}envoy.extensions"


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """One change of routes at a time: the files hold all services, so whoever writes must know them all.

    Held from the moment the routes are read until they are applied. Not reentrant.
    """
    directory = router_directory(settings)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+") as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise RolloutError(
                        f"process {lock.read() or 'unknown'} has changed the router for {_LOCK_SECONDS:g} s",
                        "one change of the router at a time, each of some seconds",
                        "see what that process does; when it is stopped, end it, and run this again",
                    ) from None
                time.sleep(_POLL_SECONDS)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def apply(
    settings: Settings,
    routes: Routes,
    *,
    healthy: Iterable[Endpoint] | None = None,
    timeout_seconds: float = 15.0,
) -> None:
    """Bring Envoy to these routes and return when it has them: `render`, `write`, `wait_applied`."""
    write(router_directory(settings), render(routes, settings))
    wait_applied(settings, routes, healthy=healthy, timeout_seconds=timeout_seconds)


def render(routes: Routes, settings: Settings, *, request_timeout_seconds: float = 60.0) -> dict[str, str]:
    """File name → content, for the environments of `settings`. Equal routes give equal bytes."""
    directory = router_directory(settings)
    environments = {name: _with_endpoints(routes.get(name, {})) for name in settings.router_ports}
    files: dict[str, JsonObject] = {}
    clusters = []
    for environment, services in environments.items():
        routes_file = f"routes-{environment}.json"
        files[routes_file] = _response([_route_table(environment, services, request_timeout_seconds)])
        for service, endpoints in services.items():
            for name, members in _clusters_of(environment, service, endpoints).items():
                endpoints_file = f"endpoints-{name}.json"
                files[endpoints_file] = _response([_assignment(name, members)])
                clusters.append(_cluster(name, directory / endpoints_file))
    files[CLUSTERS_FILE] = _response(clusters)
    files[LISTENERS_FILE] = _response(
        [
            _listener(environment, settings.host, port, directory / f"routes-{environment}.json")
            for environment, port in settings.router_ports.items()
        ]
    )
    return {name: json.dumps(content, indent=1) + "\n" for name, content in sorted(files.items())}


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Put the files in place, each by an atomic rename, in the order in which Envoy can follow.

    What is referred to comes before what refers to it: endpoints, clusters, routes, listeners. A cluster
    that goes away stays until no route names it any more. Unchanged files are left alone. Only routes that
    retry more of what fails come first: a candidate must not have a share before they are in place.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parting = _parting_clusters(directory / CLUSTERS_FILE, files[CLUSTERS_FILE])
    routes = sorted(name for name in files if name.startswith("routes-"))
    for name in routes:
        if _retries_more(directory / name, files[name]):
            _replace(directory / name, files[name])
    for name in sorted(name for name in files if name.startswith("endpoints-")):
        _replace(directory / name, files[name])
    _replace(directory / CLUSTERS_FILE, _with_clusters(files[CLUSTERS_FILE], parting))
    for name in routes:
        _replace(directory / name, files[name])
    _replace(directory / LISTENERS_FILE, files[LISTENERS_FILE])
    _replace(directory / CLUSTERS_FILE, files[CLUSTERS_FILE])
    for stale in {path.name for path in directory.glob("*.json")} - files.keys():
        (directory / stale).unlink(missing_ok=True)


def wait_applied(
    settings: Settings,
    routes: Routes,
    *,
    healthy: Iterable[Endpoint] | None = None,
    timeout_seconds: float = 15.0,
) -> None:
    """Return when Envoy routes exactly these endpoints and finds those in `healthy` (None: all) healthy.

    Raises RolloutError that says what is missing; the endpoints already in use go on serving.
    """
    needed = None if healthy is None else {(endpoint.host, endpoint.port) for endpoint in healthy}
    deadline = time.monotonic() + timeout_seconds
    while (missing := _not_applied(settings, routes, needed)) is not None:
        if time.monotonic() > deadline:
            raise RolloutError(
                f"the router did not take the new endpoints in {timeout_seconds:.0f} s: {missing}",
                "every endpoint in the router, the new ones healthy, and no other",
                f"see {settings.root / 'logs' / 'envoy.log'} and {settings.router_admin_url}/clusters",
            )
        time.sleep(_POLL_SECONDS)


def cluster_name(environment: str, service: str) -> str:
    return f"{environment}-{service}"


def _shadow_name(environment: str, service: str) -> str:
    return f"{cluster_name(environment, service)}.shadow"  # no project's name has a dot


def _clusters_of(environment: str, service: str, endpoints: Sequence[Endpoint]) -> dict[str, list[Endpoint]]:
    """Cluster → its endpoints: those that answer users, and those that only get a copy."""
    answering = [endpoint for endpoint in endpoints if not endpoint.shadow_percent]
    shadows = [endpoint for endpoint in endpoints if endpoint.shadow_percent]
    clusters = {cluster_name(environment, service): answering}
    return clusters | ({_shadow_name(environment, service): shadows} if shadows else {})


def _priorities(endpoints: Sequence[Endpoint]) -> list[tuple[int, Endpoint]]:
    """Envoy asks the first priority that has a healthy endpoint; the numbers must begin at 0."""
    alone = all(endpoint.standby for endpoint in endpoints)
    return [(int(endpoint.standby and not alone), endpoint) for endpoint in endpoints]


def _with_endpoints(services: Mapping[str, Sequence[Endpoint]]) -> dict[str, tuple[Endpoint, ...]]:
    return {service: tuple(services[service]) for service in sorted(services) if services[service]}


def _response(resources: list[JsonObject]) -> JsonObject:
    """A discovery response. Its version is its content, which lets `wait_applied` know it again."""
    content = json.dumps(resources, sort_keys=True).encode()
    return {"version_info": hashlib.sha256(content).hexdigest()[:16], "resources": resources}


def _file(path: Path) -> JsonObject:
    return {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}


def _address(host: str, port: int) -> JsonObject:
    return {"socket_address": {"address": host, "port_value": port}}


# What Envoy itself says for a service that is down, in the form of all other answers.
_ERRORS_AS_JSON: JsonObject = {
    "filter": {
        "status_code_filter": {
            "comparison": {"op": "GE", "value": {"default_value": 500, "runtime_key": "perennial.errors"}}
        }
    },
    "body_format_override": {"json_format": {"error": "%LOCAL_REPLY_BODY%"}},
}


def _listener(environment: str, host: str, port: int, routes_file: Path) -> JsonObject:
    manager = {
        "@type": f"{_EXTENSION}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": environment,
        "rds": {"route_config_name": environment, "config_source": _file(routes_file)},
        "use_remote_address": True,
        "normalize_path": True,
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "server_header_transformation": "PASS_THROUGH",
        "stream_idle_timeout": "0s",  # a route's timeout limits a request; a slow prediction is not idle
        "common_http_protocol_options": {"idle_timeout": "3600s"},
        "local_reply_config": {"mappers": [_ERRORS_AS_JSON]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": f"{_EXTENSION}.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            }
        ],
    }
    return {
        "@type": f"{_API}.listener.v3.Listener",
        "name": environment,
        "address": _address(host, port),
        "per_connection_buffer_limit_bytes": _RETRY_BUFFER_BYTES,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _route_table(
    environment: str, services: Mapping[str, tuple[Endpoint, ...]], timeout_seconds: float
) -> JsonObject:
    listing = {
        "environment": environment,
        "services": {
            name: {"path": f"/{name}/", "releases": sorted({e.release_id for e in endpoints})}
            for name, endpoints in services.items()
        },
    }
    unknown = {
        "error": f"there is no such service in the environment {environment}",
        "services": [f"/{name}/" for name in services],
    }
    bodies = [json.dumps(body, indent=1) + "\n" for body in (listing, unknown)]
    return {
        "@type": f"{_API}.route.v3.RouteConfiguration",
        "name": environment,
        "max_direct_response_body_size_bytes": max(4096, *(len(body.encode()) for body in bodies)),
        "virtual_hosts": [
            {
                "name": environment,
                "domains": ["*"],
                "routes": [
                    *(
                        route
                        for service, endpoints in services.items()
                        for route in _service_routes(environment, service, endpoints, timeout_seconds)
                    ),
                    _answer({"path": "/"}, 200, bodies[0]),
                    _answer({"prefix": "/"}, 404, bodies[1]),
                ],
            }
        ],
    }


def _service_routes(
    environment: str, service: str, endpoints: Sequence[Endpoint], timeout_seconds: float
) -> list[JsonObject]:
    answering = {endpoint.release_id for endpoint in endpoints if not endpoint.shadow_percent}
    action: JsonObject = {
        "cluster": cluster_name(environment, service),
        "cluster_not_found_response_code": "SERVICE_UNAVAILABLE",
        "prefix_rewrite": "/",
        "timeout": f"{timeout_seconds:g}s",
        # A prediction changes nothing, so any request may be asked again, of another endpoint where it can.
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset-before-request,reset,retriable-status-codes",
            # What one release fails is asked of the other, where there is one: no user sees what it failed.
            "retriable_status_codes": [500, 502, 503, 504] if len(answering) > 1 else [503],
            # Some five seconds: what a killed process needs to be back, beside a candidate that fails too.
            "num_retries": 25,
            "retry_back_off": {"base_interval": "0.010s", "max_interval": "0.500s"},
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": f"{_EXTENSION}.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    },
                }
            ],
            "host_selection_retry_max_attempts": 5,
            "retry_priority": {
                "name": "envoy.retry_priorities.previous_priorities",
                "typed_config": {
                    "@type": f"{_EXTENSION}.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                    "update_frequency": 2,
                },
            },
        },
    }
    shadows = [endpoint for endpoint in endpoints if endpoint.shadow_percent]
    if shadows:
        share = {"numerator": shadows[0].shadow_percent, "denominator": "HUNDRED"}
        action["request_mirror_policies"] = [
            {"cluster": _shadow_name(environment, service), "runtime_fraction": {"default_value": share}}
        ]
    headers = [
        {
            "header": {"key": "x-forwarded-prefix", "value": f"/{service}"},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
    ]
    return [
        {"match": match, "route": action, "request_headers_to_add": headers}
        for match in ({"prefix": f"/{service}/"}, {"path": f"/{service}"})
    ]


def _answer(match: JsonObject, status: int, body: str) -> JsonObject:
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": body}},
        "response_headers_to_add": [
            {
                "header": {"key": "content-type", "value": "application/json"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
    }


def _cluster(name: str, endpoints_file: Path) -> JsonObject:
    return {
        "@type": f"{_API}.cluster.v3.Cluster",
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": _file(endpoints_file)},
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        # An endpoint that is taken out is out at once; what it is still answering goes on.
        "ignore_health_on_host_removal": True,
        # Only when not a single endpoint is healthy is traffic sent to unhealthy ones: better than none.
        # And what becomes healthy, or weighs something else, does so at once: not collected for a second.
        "common_lb_config": {"healthy_panic_threshold": {"value": 1.0}, "update_merge_window": "0s"},
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "1s",
                # Without these, checks pause for a minute while there is no traffic.
                "no_traffic_interval": "1s",
                "no_traffic_healthy_interval": "1s",
                "unhealthy_interval": "0.250s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "reuse_connection": True,
                "http_health_check": {"path": "/health/ready"},
            }
        ],
        "outlier_detection": {
            # Only connections that fail and 502-504 count: a 500 may be the request's own fault.
            "consecutive_gateway_failure": 3,
            "enforcing_consecutive_gateway_failure": 100,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
            "interval": "1s",
            "base_ejection_time": "2s",
            "max_ejection_time": "10s",
            "max_ejection_percent": 50,
            "always_eject_one_host": True,
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": 4096,
                    "max_pending_requests": 4096,
                    "max_requests": 4096,
                    "max_retries": 4096,
                }
            ]
        },
        "per_connection_buffer_limit_bytes": _RETRY_BUFFER_BYTES,
    }


def _assignment(name: str, endpoints: Sequence[Endpoint]) -> JsonObject:
    by_priority: dict[int, list[JsonObject]] = {}
    for priority, endpoint in _priorities(endpoints):
        by_priority.setdefault(priority, []).append(
            {
                "endpoint": {"address": _address(endpoint.host, endpoint.port)},
                "load_balancing_weight": endpoint.weight,
                "metadata": {"filter_metadata": {"perennial": {"release": endpoint.release_id}}},
            }
        )
    return {
        "@type": f"{_API}.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": name,
        "endpoints": [
            {"priority": priority, "lb_endpoints": members}
            for priority, members in sorted(by_priority.items())
        ],
    }


def _retries_more(present: Path, wanted: str) -> bool:
    """Whether routes to the same clusters as those in place retry some service's failures of more kinds."""
    try:
        before, after = _retried(present.read_text()), _retried(wanted)
    except (OSError, ValueError, KeyError):
        return False
    return before.keys() == after.keys() and any(after[name] > before[name] for name in after)


def _retried(routes: str) -> dict[str, int]:
    """Cluster → how many kinds of failures are retried; a shadow's cluster → 0."""
    found: dict[str, int] = {}
    for table in json.loads(routes)["resources"]:
        for action in (route["route"] for route in table["virtual_hosts"][0]["routes"] if "route" in route):
            found[action["cluster"]] = len(action["retry_policy"]["retriable_status_codes"])
            found |= {mirror["cluster"]: 0 for mirror in action.get("request_mirror_policies", [])}
    return found


def _parting_clusters(present: Path, wanted: str) -> list[JsonObject]:
    try:
        before = json.loads(present.read_text())["resources"]
    except (OSError, ValueError, KeyError):
        return []
    staying = {cluster["name"] for cluster in json.loads(wanted)["resources"]}
    return [cluster for cluster in before if cluster["name"] not in staying]


def _with_clusters(content: str, more: list[JsonObject]) -> str:
    if not more:
        return content
    return json.dumps(_response(json.loads(content)["resources"] + more), indent=1) + "\n"


def _replace(path: Path, content: str) -> None:
    if path.exists() and path.read_text() == content:
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(content)
    temporary.replace(path)  # Envoy looks again when a file is moved into place, never when it is written


def _not_applied(
    settings: Settings, routes: Routes, needed: set[tuple[str, int]] | None = None
) -> str | None:
    """What Envoy lacks, in words; None when it has all. `needed`: who must be healthy, None for all."""
    answer = probe(f"{settings.router_admin_url}/clusters?format=json")
    if answer is None or answer.status != 200:
        return f"its admin address {settings.router_admin_url} does not answer"
    known = {
        cluster["name"]: {_host(host): _health(host) for host in cluster.get("host_statuses", [])}
        for cluster in answer.json().get("cluster_statuses", [])
    }
    wanted = {
        name: {(e.host, e.port, e.weight, priority) for priority, e in _priorities(members)}
        for environment, services in routes.items()
        for service, endpoints in services.items()
        if endpoints
        for name, members in _clusters_of(environment, service, endpoints).items()
    }
    for name, endpoints in wanted.items():
        hosts = known.get(name, {})
        for host, port, weight, priority in sorted(endpoints):
            if (host, port, weight, priority) not in hosts:
                return f"{name} lacks {host}:{port} with weight {weight} and priority {priority}"
            trouble = hosts[host, port, weight, priority]
            if trouble and (needed is None or (host, port) in needed):
                return f"{host}:{port} of {name} is not healthy ({trouble})"
        for host, port, _, _ in sorted(hosts.keys() - endpoints):
            return f"{name} still has {host}:{port}"
    for name in sorted(known.keys() - wanted.keys()):
        return f"the service {name} is still there"
    return _routes_not_applied(settings)


def _routes_not_applied(settings: Settings) -> str | None:
    answer = probe(f"{settings.router_admin_url}/config_dump?resource=dynamic_route_configs")
    if answer is None or answer.status != 200:
        return f"its admin address {settings.router_admin_url} does not answer"
    known = {
        entry["route_config"]["name"]: entry["version_info"] for entry in answer.json().get("configs", [])
    }
    for environment in settings.router_ports:
        path = router_directory(settings) / f"routes-{environment}.json"
        if known.get(environment) != json.loads(path.read_text())["version_info"]:
            return f"the routes of {environment} are not the ones written last"
    return None


def router_directory(settings: Settings) -> Path:
    """Where Envoy looks for its files."""
    return settings.root / "router"


def _host(status: JsonObject) -> tuple[str, int, int, int]:
    address = status["address"]["socket_address"]
    return address["address"], address["port_value"], status.get("weight", 1), status.get("priority", 0)


def _health(status: JsonObject) -> str:
    health: dict[str, Any] = status.get("health_status", {})
    return ", ".join(key for key, value in health.items() if value and key != "eds_health_status")
