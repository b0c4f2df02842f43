"""The two targets, each with what a test of the contract must know of it beside the contract."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from perennial import container_spec, engine
from perennial.containers import DockerTarget
from perennial.probe import probe
from perennial.settings import Settings
from perennial.supervision import Supervisor
from perennial.targets import Instance, ProcessTarget, Running, Target
from perennial.values import Endpoint
from tests import installations
from tests.installations import SERVICE, until


class Kind:
    """A target of an installation, and its accidents."""

    target: Target
    python: str
    script: str  # of the test service, where it runs
    given_up: str  # the state of one that dies and dies
    settings: Settings

    def instance(self, letter: str, *options: str, **more: Any) -> Instance:
        release_id = f"toy-{letter * 12}"
        argv = (self.python, self.script, "--release-id", release_id, *options)
        return installations.instance(self.settings, letter, **{"argv": argv, **self.fields(), **more})

    def fields(self) -> dict[str, Any]:
        return {}

    def serving(self, letter: str, *options: str, **more: Any) -> Endpoint:
        """A release that is ready."""
        endpoint = self.target.start(self.instance(letter, *options, **more))
        self.target.wait_ready(endpoint, 20.0)
        return endpoint

    def only(self) -> Running:
        [running] = self.target.instances()
        return running

    def variables(self) -> list[str]:
        """Of the only instance's first process."""
        return Path(f"/proc/{self.only().pid}/environ").read_bytes().decode().split("\0")

    def kill(self) -> int:
        """SIGKILL the only instance; its process id."""
        pid = self.only().pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def spool_inside(self, instance: Instance) -> str:
        """The spool's path as the instance knows it."""
        raise NotImplementedError

    def begin(self, instance: Instance) -> Endpoint:
        """A start that was killed before anything ran."""
        raise NotImplementedError

    def end(self, name: str) -> None:
        """Stop it behind the target's back, or as a `stop` that was killed in its middle."""
        raise NotImplementedError

    def log_of(self, name: str) -> str:
        """What the next command of an error names."""
        raise NotImplementedError


class Processes(Kind):
    python, script, given_up = sys.executable, str(SERVICE), "FATAL"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.target: ProcessTarget = ProcessTarget(settings)

    def spool_inside(self, instance: Instance) -> str:
        return str(instance.spool)

    def begin(self, instance: Instance) -> Endpoint:
        return self.target._configure(instance)  # the file is written, supervisord knows nothing of it

    def end(self, name: str) -> None:
        Supervisor(self.settings).stop(name)
        until(lambda: self.only().state == "STOPPED", 10, "its end")

    def log_of(self, name: str) -> str:
        return f"{name}.log"


class Containers(Kind):
    python, script, given_up = "python3", "/service.py", "BACKOFF"

    def __init__(self, settings: Settings, image: str) -> None:
        self.settings = settings
        self.image = image
        self.target: DockerTarget = DockerTarget(settings)

    def fields(self) -> dict[str, Any]:
        return {"image": self.image}

    def spool_inside(self, instance: Instance) -> str:
        return "/spool"

    def begin(self, instance: Instance) -> Endpoint:
        with engine.open_engine() as opened:
            port = self.settings.first_service_port
            container_spec.make_folders(instance)
            body = self.target._wanted(instance, port)
            opened.api.create_container_from_config(body, self.log_of(instance.name))
            return Endpoint(
                name=instance.name, host=self.settings.host, port=port, release_id=instance.release_id
            )

    def end(self, name: str) -> None:
        with engine.open_engine() as opened:
            opened.api.stop(self.log_of(name))

    def log_of(self, name: str) -> str:
        return self.target._container(name)


def answers(port: int) -> str | None:
    """The release that answers there."""
    answer = probe(f"http://127.0.0.1:{port}/health/ready")
    return answer.headers["x-perennial-release"] if answer else None
