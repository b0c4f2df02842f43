"""Images of releases, built and run by a real engine. The local base takes some 20 s, once."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from perennial import artifacts, environments, image_site, images
from perennial.engine import open_engine
from perennial.errors import InstallationError, ProjectError, ReleaseError
from perennial.images import Image
from perennial.store import Store
from perennial.targets import Instance, open_target
from perennial.values import ModelEnvironment
from tests.engines import engine_or_skip
from tests.installations import call, own_settings
from tests.releases import a_release
from tests.served import LOCK, REPOSITORY, write_release

NOBODY = 65532
PORT = "8080/tcp"
LIMIT_BYTES = 150_000_000


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with engine_or_skip() as engine:
        yield engine
        for image in engine.images.list(name="perennial/toy"):
            for tag in image.tags:
                engine.images.remove(tag)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def wheel(work: Path) -> Path:
    return environments.serving_wheel(work / "wheel")


@pytest.fixture(scope="module")
def compiled(engine: Any, work: Path, wheel: Path) -> Image:
    release = write_release(work / "first", "toy-0123456789ab", weight=0.5)
    return images.build_image(engine, release, LOCK, wheel, work)


@contextlib.contextmanager
def started(engine: Any, image: Image, log: Path) -> Iterator[Any]:
    """A container as production would run it: nothing to write to but the spool and the prediction log."""
    log.mkdir(exist_ok=True)
    log.chmod(0o777)
    container = engine.containers.run(
        image.reference,
        ["--environment", "test", "--prediction-log", "file:///log"],
        detach=True,
        read_only=True,
        tmpfs={"/spool": ""},
        volumes={str(log): {"bind": "/log", "mode": "rw"}},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        ports={PORT: ("127.0.0.1", None)},
    )
    try:
        yield container
    finally:
        container.remove(force=True)


def ask(container: Any, rows: list[dict[str, Any]]) -> list[float]:
    """The predictions, once the service is ready."""
    deadline = time.monotonic() + 30
    body = json.dumps({"rows": rows})
    while True:
        container.reload()
        assert container.status == "running" and time.monotonic() < deadline, container.logs().decode()
        connection = http.client.HTTPConnection(
            "127.0.0.1", int(container.ports[PORT][0]["HostPort"]), timeout=5
        )
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 503:
                assert answer.status == 200, answer.read()
                predictions: list[float] = json.loads(answer.read())["predictions"]
                return predictions
        time.sleep(0.02)


def run_inside(container: Any, code: str) -> str:
    done = container.exec_run(["python3", "-c", code])
    assert done.exit_code == 0, done.output
    said: str = done.output.decode().strip()
    return said


def test_a_base_that_the_engine_does_not_take_is_explained(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base-image.sh").write_text('#!/bin/sh\nyes "no tar" | head -c 5000 >"$1"\n')
    (tmp_path / "base-image.sh").chmod(0o755)
    monkeypatch.setattr(images, "DOCKER_FILES", tmp_path)
    with pytest.raises(InstallationError, match="refused to import perennial/base"):
        images.local_base(engine, tmp_path / "work")


def test_a_compiled_release_serves_as_nobody_from_a_read_only_root_and_drains(
    engine: Any, compiled: Image, tmp_path: Path
) -> None:
    with started(engine, compiled, tmp_path / "log") as container:
        (answer,) = ask(container, [{"x": 3.0, "y": 1.0}])
        assert answer == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-15)
        assert run_inside(container, "import os; print(os.getuid(), os.getgid())") == f"{NOBODY} {NOBODY}"
        names = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
        expected = sorted(
            (*image_site.COMPILED_DISTRIBUTIONS, "perennial-serving"), key=lambda name: name.replace("-", "_")
        )
        found = run_inside(container, names).replace("typing_extensions", "typing-extensions")
        assert sorted(found.split()) == sorted(expected)
        assert "telemetry" not in container.logs().decode()  # onnxruntime would send some, and says so here
        container.stop(timeout=20)
        assert container.wait()["StatusCode"] == 0, container.logs().decode()
    assert [path for path in (tmp_path / "log").rglob("*") if path.is_file()]  # the log outlives the service


def test_its_image_is_small(compiled: Image) -> None:
    assert compiled.path == "compiled"
    assert compiled.size_bytes < LIMIT_BYTES


def test_a_new_model_is_one_new_layer(engine: Any, compiled: Image, work: Path, wheel: Path) -> None:
    release = write_release(work / "second", "toy-ba9876543210", weight=0.75)
    second = images.build_image(engine, release, LOCK, wheel, work)
    assert second.runtime == compiled.runtime
    old, new = (engine.images.get(each.image_id).attrs["RootFS"]["Layers"] for each in (compiled, second))
    assert new[:-1] == old[:-1] and new[-1] != old[-1]


def test_the_same_release_is_the_same_image(engine: Any, compiled: Image, work: Path, wheel: Path) -> None:
    again = write_release(work / "again", "toy-0123456789ab", weight=0.5)
    assert images.build_image(engine, again, LOCK, wheel, work) == compiled


def test_nothing_of_this_machine_is_inside(engine: Any, compiled: Image, work: Path) -> None:
    image = engine.images.get(compiled.image_id)
    container = engine.containers.create(compiled.image_id, ["--help"])
    try:
        with tempfile.TemporaryFile() as file:
            for chunk in container.export(chunk_size=1 << 22):
                file.write(chunk)
            file.seek(0)
            with tarfile.open(fileobj=file) as tar:
                files = {m.name: (m, _content(tar, m)) for m in tar if m.isfile()}
    finally:
        container.remove(force=True)
    traces = [
        str(REPOSITORY).encode(),
        str(work).encode(),
        *(name.encode() for name in _secrets_and_indexes()),
    ]
    holding = [(name, trace) for name, (_, content) in files.items() for trace in traces if trace in content]
    assert holding == []
    assert not [trace for trace in traces if trace.decode() in json.dumps([image.attrs, image.history()])]
    kept = {".netrc", "pip.conf", "uv.toml", "direct_url.json", "RECORD", "credentials"}
    assert not [name for name in files if Path(name).name in kept]
    authorities = b"".join(
        content
        for name, (_, content) in sorted(files.items())
        if name.startswith("usr/share/ca-certificates/")
    )
    assert (
        files["etc/ssl/certs/ca-certificates.crt"][1] == authorities
    )  # Debian's, whatever this machine trusts
    assert not [name for name, (member, _) in files.items() if member.mode & 0o6000]
    assert not {"usr/bin/sh", "bin/sh", "usr/bin/dpkg", "usr/bin/apt"} & files.keys()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _secrets_and_indexes() -> set[str]:
    """What this machine's environment says of its package indexes and its secrets."""
    found = set()
    for name, value in os.environ.items():
        if "://" in value and name.upper().startswith(("PIP_", "UV_", "HTTP_PROXY", "HTTPS_PROXY")):
            found |= {urlsplit(url).hostname or url for url in value.split()}
        if any(word in name.upper() for word in ("SECRET", "TOKEN", "PASSWORD")) and len(value) > 7:
            found.add(value)
    return found - {"127.0.0.1", "localhost"}


def test_a_release_that_is_not_compiled_serves_the_original(
    engine: Any, work: Path, wheel: Path, tmp_path: Path
) -> None:
    libraries = ("pandas", "python-dateutil", "pytz", "tzdata")
    lock = work / "original.lock"
    lock.write_text(image_site.pins(LOCK.read_text(), (*image_site.COMPILED_DISTRIBUTIONS, *libraries)))
    release = write_release(work / "original", "toy-00000000000a", weight=None)
    image = images.build_image(engine, release, lock, wheel, work, python=images.LOCAL_BASE_PYTHON)
    assert image.path == "original"
    with started(engine, image, tmp_path / "log") as container:
        assert ask(container, [{"x": 3.0, "y": None}, {"x": 1.0, "y": 2.0}]) == [2.5, 2.5]


def test_a_target_serves_it_and_never_builds_it_twice(
    engine: Any,
    wheel: Path,
    tmp_path: Path,
    directory_store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = own_settings(tmp_path / "home", target="docker")
    release = a_release(
        release_id="toy-00000000000e",
        environment=ModelEnvironment(
            fingerprint="0" * 64,
            lock=artifacts.put_file(directory_store, "requirements.lock", LOCK),
            serving=artifacts.put_file(directory_store, wheel.name, wheel),
            python=images.LOCAL_BASE_PYTHON,
        ),
    )
    folder = write_release(tmp_path / "toy", release.release_id, weight=0.5)
    target = open_target(here)
    image = target.prepare(release, folder, directory_store)
    assert image.startswith("sha256:")
    with monkeypatch.context() as without_dockerfiles:
        without_dockerfiles.setattr(images, "DOCKER_FILES", tmp_path / "nowhere")
        assert target.prepare(release, folder, directory_store) == image

    instance = Instance(
        environment="production",
        project="toy",
        release_id=release.release_id,
        python=Path("python3"),
        release=folder,
        image=image,
        prediction_log=here.store,
        spool=here.root / "spool" / "production" / "toy",
    )
    endpoint = target.start(instance)
    try:
        target.wait_ready(endpoint, 30)
        url = f"http://{endpoint.host}:{endpoint.port}/predict"
        status, answer, headers = call(url, {"rows": [{"x": 3.0, "y": 1.0}]})
        assert status == 200 and headers["x-perennial-release"] == release.release_id
        assert answer["predictions"] == pytest.approx([1 / (1 + math.exp(-0.5))], abs=1e-15)
        container = engine.containers.list(filters={"label": f"perennial.release={release.release_id}"})[0]
        assert container.labels["org.opencontainers.image.revision"] == "0" * 40
        assert container.labels["perennial.dataset"] == "0" * 64
        look = container.attrs["Config"]["Healthcheck"]["Test"][1:]
        assert container.exec_run(look).exit_code == 0
        silent = engine.containers.create(image, look[1:], entrypoint=look[:1], network_mode="none")
        silent.start()
        assert silent.wait()["StatusCode"] == 1
        silent.remove()
    finally:
        target.stop(endpoint.name, 10.0)
    [log] = (here.root / "store" / "predictions" / "production" / "toy").rglob("*.arrows")
    assert log.name.startswith(release.release_id)
    assert not list(instance.spool.rglob("*.arrows"))


def test_what_is_no_release_is_refused(engine: Any, work: Path, wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="is not a release directory"):
        images.build_image(engine, tmp_path, LOCK, wheel, work)


def test_a_link_in_a_release_is_refused(engine: Any, work: Path, wheel: Path, tmp_path: Path) -> None:
    release = write_release(tmp_path / "linked", "toy-00000000000b", weight=1.0)
    (release / "model" / "passwords").symlink_to("/etc/passwd")
    with pytest.raises(ReleaseError, match="passwords is a link"):
        images.build_image(engine, release, LOCK, wheel, work)


def test_a_base_that_is_not_there_is_named(engine: Any, work: Path, wheel: Path, tmp_path: Path) -> None:
    release = write_release(tmp_path / "toy", "toy-00000000000c", weight=1.0)
    with pytest.raises(InstallationError, match=r"no image python@sha256:0{64}"):
        images.build_image(engine, release, LOCK, wheel, work, base=f"python@sha256:{'0' * 64}")


def test_another_python_than_the_models_own_is_refused(
    engine: Any, work: Path, wheel: Path, tmp_path: Path
) -> None:
    release = write_release(tmp_path / "toy", "toy-00000000000d", weight=None)
    with pytest.raises(
        InstallationError, match=r"has Python 3\.11, and toy-00000000000d is served by the orig"
    ):
        images.build_image(engine, release, LOCK, wheel, work, python="3.14")


def test_a_lock_without_a_runtime_is_refused() -> None:
    lock = "numpy==2.4.6 \\\n    --hash=sha256:00\n# a comment\nuvloop==0.23.0\n"
    assert image_site.pins(lock, ("NumPy",)) == "numpy==2.4.6 \\\n    --hash=sha256:00\n"
    with pytest.raises(ProjectError, match="pins no onnxruntime"):
        image_site.pins(lock, ("numpy", "onnxruntime"))


def test_no_engine_is_said_plainly(tmp_path: Path) -> None:
    with (
        pytest.raises(InstallationError, match="no Docker engine"),
        open_engine(f"unix://{tmp_path}/docker.sock"),
    ):
        pass
