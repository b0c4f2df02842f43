"""The store behind an S3 API: a build, a deploy and the prediction log, the keys held by a Prefect block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from prefect.client.orchestration import SyncPrefectClient

from perennial import installation
from perennial.store import StoreCredentials, open_store
from perennial.targets import ProcessTarget
from tests.factories import make_project
from tests.flows.house import AS_OF, ROW, House, installed, new_settings
from tests.flows.seaweed import KEYS, seaweed
