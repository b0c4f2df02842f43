"""The local installation: one supervisord with all that runs. Start it, stop it, see how it is."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import NamedTuple

from perennial import leftovers, ports, router, supervision
from perennial.errors import InstallationError
from perennial.journal import open_journal
from perennial.orphans import crash_orphans
from perennial.probe import probe
from perennial.process import scrubbed_environment, start_daemon
from perennial.reconcile import reconcile
from perennial.settings import Settings, object_store_environment
from perennial.supervision import Process, Supervisor
from perennial.targets import Running, open_target

# Raised when what HOME holds is laid out in another way than the version before could read.
LAYOUT_VERSION = 1

REPOSITORY = Path(__file__).resolve().parent.parent
_INFRA = REPOSITORY / "infra" / "local"

PARTS = ("envoy", "prefect-server", "mlflow", "storefront", "prefect-worker")
WORK_POOL = "local"

_POLL_SECONDS = 0.05
_SUPERVISOR_SECONDS = 15.0
_STOP_SECONDS = 120.0  # services drain; supervisord kills each at its own limit, well before

Say = Callable[[str], None]


class Part(NamedTuple):
    """One program of the installation, and the address that answers 200 when it is well."""

    name: str
    url: str
    health: str
    ports: dict[str, int]  # variable that chooses the port → port


class Status(NamedTuple):
    """How one part or service is."""

    name: str
    state: str
    pid: int
    uptime_seconds: float
    url: str


def up(
    settings: Settings,
    *,
    parts: Sequence[str] = PARTS,
    timeout_seconds: float = 120.0,
    say: Say = print,
) -> None:
    """Start what does not run yet and return when all of it is healthy. Running parts are reused.

    Raises InstallationError: a port is taken, HOME is of another layout, a part does not get healthy.
    """
    root = settings.root
    for folder in ("run", "logs", "services", "store", "prefect", "router"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _check_layout(root)
    known = _parts(settings)
    chosen = [known[name] for name in parts]
    supervisor = Supervisor(settings)
    started = time.monotonic()
    with _alone(root):
        _write_configuration(settings)
        if not supervisor.is_running():
            _check_ports(settings, chosen)
            _start_supervisor(settings, supervisor)
        else:
            _reload(supervisor)
            running = supervisor.processes()
            _check_ports(settings, [part for part in chosen if running[part.name].is_down])
        _start(settings, supervisor, chosen, started, timeout_seconds, say)
    if "envoy" in parts:  # what a deploy that was cut off left behind is brought to what the journal says
        reconcile(settings, open_journal(settings.database), open_target(settings))


def down(settings: Settings, *, say: Say = print) -> None:
    """Stop everything that `up` started, services after they have drained, and nothing else."""
    root = settings.root
    supervisor = Supervisor(settings)
    began = time.monotonic()
    if not supervisor.is_running():
        left = leftovers.marked(root)
        leftovers.end(left)
        say(f"ended {len(left)} processes left over in {root}" if left else f"nothing runs in {root}")
        return
    with _alone(root):
        names = list(supervisor.processes())
        # First whoever brings work, and the services, whose last answers still go through the router.
        first = [name for name in names if name not in PARTS or name == "prefect-worker"]
        for group in (first, [name for name in names if name not in first]):
            _stop(supervisor, group)
        pid = supervisor.pid()
        leftovers.end(leftovers.descendants(pid))
        supervisor.shutdown()
        _wait_gone(pid)
        leftovers.end(leftovers.marked(root))
    say(f"stopped {len(names)} programs in {time.monotonic() - began:.1f} s")


def status(settings: Settings) -> str:
    """A table of parts and services, as plain text."""
    rows = statuses(settings)
    if not rows:
        return f"nothing runs in {settings.root}\nNext: make up"
    head = ("part", "state", "pid", "uptime", "url")
    cells = [
        head,
        *((r.name, r.state.lower(), str(r.pid or ""), _span(r.uptime_seconds), r.url) for r in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def statuses(settings: Settings) -> tuple[Status, ...]:
    """Each part and each service; none when the installation does not run."""
    supervisor = Supervisor(settings)
    if not supervisor.is_running():
        return ()
    processes = supervisor.processes()
    found = [
        _status(processes[name], part.url) for name, part in _parts(settings).items() if name in processes
    ]
    return (*found, *(_service_status(settings, s) for s in open_target(settings).instances()))


def require_running(settings: Settings) -> None:
    """Raises InstallationError, with the command to run, when the Prefect server does not answer."""
    health = f"{settings.prefect_url}/api/health"
    answer = probe(health)
    if answer is None or answer.status != 200:
        raise InstallationError(
            f"the Prefect server does not answer at {settings.prefect_url}",
            f"200 from {health}",
            "make up",
        )


def prefect_environment(settings: Settings) -> dict[str, str]:
    """What a Prefect command or flow of this installation needs in its environment."""
    return {
        "PREFECT_HOME": str(settings.root / "prefect"),
        "PREFECT_API_URL": f"{settings.prefect_url}/api",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # bridges a restart of the server of up to two minutes
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(settings.root / "prefect" / "results"),
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",  # a retried run must not train again
        "DO_NOT_TRACK": "1",
        "MLFLOW_TRACKING_URI": settings.mlflow_url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _parts(settings: Settings) -> dict[str, Part]:
    prefect, mlflow, store = settings.prefect_url, settings.mlflow_url, settings.storefront_url
    router_ports = {f"PERENNIAL_{name.upper()}_PORT": port for name, port in settings.router_ports.items()}
    parts = (
        Part(
            "envoy",
            "  ".join(settings.router_url(environment) for environment in settings.router_ports),
            f"{settings.router_admin_url}/ready",
            {**router_ports, "PERENNIAL_ROUTER_ADMIN_PORT": settings.router_admin_port},
        ),
        Part(
            "prefect-server",
            prefect,
            f"{prefect}/api/health",
            {"PERENNIAL_PREFECT_PORT": settings.prefect_port},
        ),
        Part("mlflow", mlflow, f"{mlflow}/health", {"PERENNIAL_MLFLOW_PORT": settings.mlflow_port}),
        Part("storefront", store, f"{store}/health", {"PERENNIAL_STOREFRONT_PORT": settings.storefront_port}),
        # The worker makes its pool when it starts for the first time; deployments that name it come next.
        Part("prefect-worker", f"work pool {WORK_POOL}", f"{prefect}/api/work_pools/{WORK_POOL}", {}),
    )
    return {part.name: part for part in parts}


def _check_layout(root: Path) -> None:
    version = root / "version"
    if not version.exists():
        if (root / "mlflow.db").exists():  # not the journal: reading the status makes one before any `up`
            raise _other_layout(root, "an unknown version")
        version.write_text(f"{LAYOUT_VERSION}\n")
    elif (found := version.read_text().strip()) != str(LAYOUT_VERSION):
        raise _other_layout(root, f"version {found}")


def _other_layout(root: Path, found: str) -> InstallationError:
    return InstallationError(
        f"{root} was laid out by {found} of Perennial",
        f"layout version {LAYOUT_VERSION}",
        "make clean (it removes the folder), or PERENNIAL_HOME=… make up",
    )


def _check_ports(settings: Settings, parts: Sequence[Part]) -> None:
    for part in parts:
        for variable, port in part.ports.items():
            host = "127.0.0.1" if variable == "PERENNIAL_ROUTER_ADMIN_PORT" else settings.host
            if not ports.is_free(host, port):
                raise _taken(settings, part, variable, port)


def _taken(settings: Settings, part: Part, variable: str, port: int) -> InstallationError:
    holder = ports.holder(port)
    if holder and holder[0] in leftovers.marked(settings.root):
        return InstallationError(
            f"port {port} for {part.name} is held by a process left over in {settings.root}: "
            f"{holder[1]} (pid {holder[0]})",
            "a free port",
            "make down",
        )
    who = f" by {holder[1]} (pid {holder[0]})" if holder else ""
    return InstallationError(
        f"port {port} for {part.name} is taken{who}",
        "a free port",
        f"make down where that was started, or {variable}=… make up",
    )


def _write_configuration(settings: Settings) -> None:
    root = settings.root
    if not (root / "router" / router.LISTENERS_FILE).exists():
        router.write(router.router_directory(settings), router.render({}, settings))
    _fill("envoy.json", root / "run" / "envoy.json", _envoy_names(settings))
    supervision.socket_path(settings).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _fill("supervisord.conf", root / "run" / "supervisord.conf", _supervisor_names(settings))


def _envoy_names(settings: Settings) -> dict[str, object]:
    return {"admin_port": settings.router_admin_port, "router": router.router_directory(settings)}


def _supervisor_names(settings: Settings) -> dict[str, object]:
    root = settings.root
    ours = settings.as_environment() | object_store_environment()
    prefect = prefect_environment(settings)
    prefect_database = (
        settings.prefect_database_url or f"sqlite+aiosqlite:///{root / 'prefect' / 'prefect.db'}"
    )
    names: dict[str, object] = {
        "socket": supervision.literal(supervision.socket_path(settings)),
        "root": supervision.literal(root),
        "run": supervision.literal(root / "run"),
        "logs": supervision.literal(root / "logs"),
        "program_logs": supervision.log_path(root / "logs"),
        "repository": supervision.literal(REPOSITORY),
    }
    commands = {
        # Files are watched and there is one Envoy: nothing to hand over on a hot restart.
        "envoy": [
            _program("envoy"),
            "--config-path",
            str(root / "run" / "envoy.json"),
            "--disable-hot-restart",
            "--concurrency",
            "2",
            "--log-level",
            "warning",
        ],
        "prefect_server": [
            _program("prefect"),
            "server",
            "start",
            "--host",
            settings.host,
            "--port",
            str(settings.prefect_port),
        ],
        "prefect_worker": [
            _program("prefect"),
            "worker",
            "start",
            "--pool",
            WORK_POOL,
            "--type",
            "process",
            "--name",
            "perennial",
        ],
        "mlflow": [
            _program("mlflow"),
            "server",
            "--host",
            settings.host,
            "--port",
            str(settings.mlflow_port),
            "--workers",
            "1",
        ],
        "storefront": [sys.executable, "-m", "perennial.storefront"],
    }
    environments = {
        "prefect_server": prefect | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": prefect_database},
        "prefect_worker": prefect | ours | {"PREFECT_WORKER_QUERY_SECONDS": "2"},
        "mlflow": _mlflow_environment(settings) | object_store_environment(),
        "storefront": ours,
    }
    names |= {f"{name}_command": supervision.command(argv) for name, argv in commands.items()}
    names |= {f"{name}_environment": supervision.environment(e) for name, e in environments.items()}
    return names


def _mlflow_environment(settings: Settings) -> dict[str, str]:
    artifacts = f"{settings.store.rstrip('/')}/mlflow"
    variables = {
        "MLFLOW_BACKEND_STORE_URI": settings.mlflow_database_url
        or f"sqlite:///{settings.root / 'mlflow.db'}",
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        "MLFLOW_SERVE_ARTIFACTS": "true",
        # Names and addresses by which a browser may call it: others are DNS rebinding.
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(
            f"{host}:{settings.mlflow_port}" for host in ("localhost", "127.0.0.1", settings.host)
        ),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # runs jobs of MLflow's own; needs two more processes
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if settings.s3_endpoint_url:
        variables["MLFLOW_S3_ENDPOINT_URL"] = settings.s3_endpoint_url
    return variables


def _program(name: str) -> str:
    """A program that is installed beside this Python."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise InstallationError(
            f"the program {name} is not installed", f"{name} beside {sys.executable}", "make setup"
        )
    return found


def _fill(template: str, path: Path, names: dict[str, object]) -> None:
    text = Template((_INFRA / template).read_text()).substitute({k: str(v) for k, v in names.items()})
    temporary = path.with_suffix(".tmp")
    temporary.touch(mode=0o600)  # database URLs may hold passwords
    temporary.write_text(text)
    temporary.replace(path)


def _start_supervisor(settings: Settings, supervisor: Supervisor) -> None:
    root = settings.root
    log = root / "logs" / "supervisord.out"
    log.unlink(missing_ok=True)
    argv = [
        sys.executable,
        "-P",  # what lies beside a script is no top-level module
        str(Path(__file__).with_name("supervisord.py")),
        "-n",
        "-c",
        str(root / "run" / "supervisord.conf"),
    ]
    environment = scrubbed_environment(network=True, **{leftovers.MARK: str(root), "PYTHONUNBUFFERED": "1"})
    pid = start_daemon(argv, cwd=root, environment=environment, log=log)
    deadline = time.monotonic() + _SUPERVISOR_SECONDS
    while not supervisor.is_running():
        if time.monotonic() > deadline or not leftovers.is_alive(pid):
            leftovers.end([pid])
            raise InstallationError(
                f"supervisord did not start. Its last lines:\n{supervision.tail(log)}",
                "it to answer on its socket",
                f"see {log}",
            )
        time.sleep(_POLL_SECONDS)


def _reload(supervisor: Supervisor) -> None:
    """Bring parts whose configuration has changed to the new one: stopped, to be started with the others.

    Services are their target's business: one whose file a killed deployment left changed may be serving.
    """
    added, changed = ([name for name in names if name in PARTS] for names in supervisor.reread()[:2])
    _stop(supervisor, changed)
    for name in (*added, *changed):
        if name in changed:
            supervisor.remove(name)
        supervisor.add(name)


def _start(
    settings: Settings,
    supervisor: Supervisor,
    parts: Sequence[Part],
    started: float,
    timeout_seconds: float,
    say: Say,
) -> None:
    """Start parts side by side and wait for each; the worker after the server, without which it gives up."""
    before = supervisor.processes()
    waiting = {part.name: part for part in parts}
    held_back = {"prefect-worker"} & waiting.keys()
    for name in waiting.keys() - held_back:
        supervisor.start(name)
    width = max(map(len, waiting), default=0)
    while waiting:
        processes = supervisor.processes()
        for part in list(waiting.values()):
            if part.name in held_back:
                if "prefect-server" in waiting:
                    continue
                held_back.remove(part.name)
                if processes[part.name].is_down:
                    for run in crash_orphans(settings, before=datetime.now(UTC)):
                        say(f"{run!r} was under way when the installation stopped: marked as crashed")
                supervisor.start(part.name)
            elif _is_healthy(part, processes[part.name]):
                del waiting[part.name]
                reused = processes[part.name].pid == before[part.name].pid
                took = "already running" if reused else f"ready after {time.monotonic() - started:4.1f} s"
                say(f"{part.name:<{width}}  {took:<17}  {part.url}")
            else:
                late = time.monotonic() - started > timeout_seconds
                if late or processes[part.name].state in ("FATAL", "EXITED"):
                    raise _unhealthy(settings, part, processes[part.name], timeout_seconds if late else 0)
        time.sleep(_POLL_SECONDS)


def _is_healthy(part: Part, process: Process) -> bool:
    if process.state not in ("RUNNING", "STARTING"):
        return False
    if not part.ports and process.state != "RUNNING":
        return False  # what answers is another part
    answer = probe(part.health)
    return answer is not None and answer.status == 200


def _unhealthy(settings: Settings, part: Part, process: Process, late_seconds: float) -> InstallationError:
    log = settings.root / "logs" / f"{part.name}.log"
    what = f"was not healthy within {late_seconds:.0f} s" if late_seconds else "died at its start"
    return InstallationError(
        f"{part.name} {what} ({process.state.lower()}). Its last lines:\n{supervision.tail(log)}",
        f"200 from {part.health}",
        f"see {log}, then make up",
    )


def _stop(supervisor: Supervisor, names: Sequence[str]) -> None:
    """Tell all of them at once, then wait for each."""
    for name in names:
        supervisor.stop(name)
    deadline = time.monotonic() + _STOP_SECONDS
    while True:
        processes = supervisor.processes()
        remaining = [name for name in names if name in processes and not processes[name].is_down]
        if not remaining:
            return
        if time.monotonic() > deadline:
            for name in remaining:
                supervisor.kill(name)
        time.sleep(_POLL_SECONDS)


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + _SUPERVISOR_SECONDS
    while leftovers.is_alive(pid):
        if time.monotonic() > deadline:
            leftovers.end([pid])
            return
        time.sleep(_POLL_SECONDS)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One `up` or `down` at a time."""
    (root / "run").mkdir(parents=True, exist_ok=True)
    with (root / "run" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _status(process: Process, url: str) -> Status:
    return Status(process.name, process.state, process.pid, process.uptime_seconds, url)


def _service_status(settings: Settings, service: Running) -> Status:
    url = f"{settings.router_url(service.environment)}/{service.project}/"
    return Status(service.endpoint.name, service.state, service.pid, service.uptime_seconds, url)


def _span(seconds: float) -> str:
    if not seconds:
        return ""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
