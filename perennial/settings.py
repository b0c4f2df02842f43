"""Every knob of an installation, read from the environment (`PERENNIAL_*`) in this one place."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where things are. Local defaults live in one folder on loopback; production names URLs instead."""

    model_config = SettingsConfigDict(env_prefix="PERENNIAL_", frozen=True, extra="ignore")

    home: Path = Path(".perennial")
    host: str = "127.0.0.1"

    store_url: str = Field(default="", description="file:///… or s3://bucket/prefix; empty: HOME/store")
    s3_endpoint_url: str = Field(default="", description="of an S3 API that is not AWS")
    s3_credentials_block: str = Field(default="", description="name of a prefect-aws AwsCredentials block")
    database_url: str = Field(default="", description="SQLAlchemy URL of the journal; empty: SQLite in HOME")
    prefect_database_url: str = Field(default="", description="empty: SQLite in HOME")
    mlflow_database_url: str = Field(default="", description="empty: SQLite in HOME")

    target: Literal["process", "docker"] = Field(default="process", description="where services run")
    docker_url: str = Field(default="", description="of the engine; empty: DOCKER_HOST or its default")
    registry: str = Field(
        default="",
        pattern=r"^([a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)*)?$",
        description="of images, HOST[:PORT][/PREFIX]; empty: they stay in the engine",
    )
    base_image: str = Field(
        default="",
        pattern=r"^([^@\s]+@)?sha256:[0-9a-f]{64}$|^$",
        description="with Python in it, by digest; empty: the one that infra/docker/base-image.sh makes",
    )

    prefect_port: int = 4200
    mlflow_port: int = 5000
    storefront_port: int = 4280
    production_port: int = 8080
    test_port: int = 8081
    router_admin_port: int = 9901
    first_service_port: int = 18100

    @property
    def root(self) -> Path:
        """HOME as an absolute path."""
        return self.home.expanduser().resolve()

    @property
    def store(self) -> str:
        return self.store_url or (self.root / "store").as_uri()

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.root / 'perennial.db'}"

    @property
    def prefect_url(self) -> str:
        return f"http://{self.host}:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{self.host}:{self.mlflow_port}"

    @property
    def storefront_url(self) -> str:
        return f"http://{self.host}:{self.storefront_port}"

    @property
    def router_admin_url(self) -> str:
        """Envoy's own interface: on loopback whatever `host` is, since it can also end Envoy."""
        return f"http://127.0.0.1:{self.router_admin_port}"

    def router_url(self, environment: str) -> str:
        """The address users of an environment call; a service is the first segment of the path."""
        return f"http://{self.host}:{self.router_ports[environment]}"

    @property
    def router_ports(self) -> dict[str, int]:
        return {"test": self.test_port, "production": self.production_port}

    def as_environment(self) -> dict[str, str]:
        """What makes another process read these very settings, with HOME as an absolute path."""
        chosen = {name: str(value) for name, value in self.model_dump(exclude_defaults=True).items()}
        chosen["home"] = str(self.root)
        return {f"PERENNIAL_{name.upper()}": value for name, value in chosen.items()}


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()


def object_store_environment() -> dict[str, str]:
    """The variables by which the AWS libraries find an S3 API and its credentials (`AWS_*`)."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
