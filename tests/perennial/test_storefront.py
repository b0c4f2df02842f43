"""What browsers and package clients get of the store, and what nobody gets, from the running storefront."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from perennial.journal import Journal, open_journal
from perennial.probe import Answer, probe
from perennial.settings import Settings
from perennial.store import Store, open_store
from perennial.storefront import create_app
from tests.installations import own_settings, running
from tests.releases import a_release

RELEASE = "toy-0123456789ab"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    settings = own_settings(tmp_path_factory.mktemp("storefront") / "home")
    store = open_store(settings.store)
    fill(store)
    with running(settings, ["storefront"]):
        yield settings


@pytest.fixture
def journal(here: Settings) -> Journal:
    return open_journal(here.database)


def fill(store: Store) -> None:
    for key, text in {
        "simple/index.html": "<a href='toy/'>toy</a>",
        "simple/toy/index.html": "<a href='../../packages/toy/toy-1-py3-none-any.whl'>toy</a>",
        "simple/toy/index.json": '{"name": "toy"}',
        "packages/toy/toy-1-py3-none-any.whl": "PK",
        "reports/toy/evaluation/index.html": "<h1>Evaluation</h1>",
        "reports/toy/evaluation/roc.svg": "<svg/>",
        "reports/toy/evaluation/roc.png": "PNG",
        "reports/toy/tests/tests.xml": "<testsuites/>",
        "reports/toy/data/2026-03-01.json": "{}",
        "reports/toy/notes.md": "# Notes <script>",
        "reports/toy/unknown.bin": "?",
        "predictions/toy/secret.parquet": "secret",
        "snapshots/secret.parquet": "secret",
        "releases/toy/secret.json": "secret",
    }.items():
        store.put_bytes(key, text.encode())


def ask(here: Settings, path: str) -> Answer:
    answer = probe(here.storefront_url + path)
    assert answer is not None
    return answer


def raw(here: Settings, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """As a client sends it that tidies no path up."""
    connection = http.client.HTTPConnection(here.host, here.storefront_port, timeout=10)
    connection.putrequest("GET", path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    with response:
        got = response.status, response.read(), {n.lower(): v for n, v in response.getheaders()}
    connection.close()
    return got


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/simple/", "text/html; charset=utf-8", b"toy</a>"),
        ("/simple/toy/", "text/html; charset=utf-8", b"packages/toy/toy-1"),
        ("/packages/toy/toy-1-py3-none-any.whl", "application/zip", b"PK"),
        ("/reports/toy/evaluation/", "text/html; charset=utf-8", b"<h1>Evaluation</h1>"),
        ("/reports/toy/evaluation/index.html", "text/html; charset=utf-8", b"<h1>Evaluation</h1>"),
        ("/reports/toy/evaluation/roc.svg", "image/svg+xml", b"<svg/>"),
        ("/reports/toy/evaluation/roc.png", "image/png", b"PNG"),
        ("/reports/toy/tests/tests.xml", "application/xml", b"<testsuites/>"),
        ("/reports/toy/data/2026-03-01.json", "application/json", b"{}"),
        ("/reports/toy/notes.md", "text/markdown; charset=utf-8", b"# Notes"),
        ("/reports/toy/unknown.bin", "application/octet-stream", b"?"),
    ],
)
def test_index_and_reports_come_as_what_they_are_and_load_nothing(
    here: Settings, path: str, kind: str, body: bytes
) -> None:
    answer = ask(here, path)
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    assert body in answer.body
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy and "http" not in policy
    assert "form-action 'none'" in policy and "base-uri 'none'" in policy


def test_a_wheel_may_be_kept_and_a_page_may_not(here: Settings) -> None:
    assert "immutable" in ask(here, "/packages/toy/toy-1-py3-none-any.whl").headers["cache-control"]
    assert ask(here, "/simple/toy/").headers["cache-control"] == "no-cache"


def test_a_package_client_that_wants_json_gets_it(here: Settings) -> None:
    kind = "application/vnd.pypi.simple.v1+json"
    status, body, headers = raw(here, "/simple/toy/", accept=f"{kind}, text/html;q=0.1")
    assert (status, headers["content-type"], json.loads(body)) == (200, kind, {"name": "toy"})


@pytest.mark.parametrize(
    "path",
    [
        "/predictions/toy/secret.parquet",
        "/snapshots/secret.parquet",
        "/releases/toy/secret.json",
        "/reports/../predictions/toy/secret.parquet",
        "/reports/..%2fpredictions/toy/secret.parquet",
        "/reports/%2e%2e/predictions/toy/secret.parquet",
        "/reports/%2e%2e%2f%2e%2e%2fperennial.db",
        "/reports/%252e%252e/predictions/toy/secret.parquet",
        "/reports/toy/../../predictions/toy/secret.parquet",
        "/reports/..%5c..%5cperennial.db",
        "/reports/..;/predictions/toy/secret.parquet",
        "/reports//etc/passwd",
        "/reports/%2fetc/passwd",
        "/reports/toy%00/evaluation/index.html",
        "/packages/../predictions/toy/secret.parquet",
        "/packages/%2e%2e/%2e%2e/version",
        "/simple/%2e%2e/",
        "/simple/..%2fpredictions/",
        "/../version",
        "/version",
        "/store/simple/index.html",
        "/reports/toy/absent.html",
        "/reports/toy",
        "/packages/toy",
    ],
)
def test_nothing_else_of_the_store_or_the_machine_can_be_read(here: Settings, path: str) -> None:
    status, body, headers = raw(here, path)
    assert status == 404
    assert json.loads(body)["error"]
    assert (headers["content-type"], headers["x-content-type-options"]) == ("application/json", "nosniff")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_written(here: Settings, method: str) -> None:
    for path in ("/reports/toy/notes.md", "/packages/toy/toy-1-py3-none-any.whl", "/simple/"):
        connection = http.client.HTTPConnection(here.host, here.storefront_port, timeout=10)
        connection.request(method, path, body=b"x")
        assert connection.getresponse().status == 405
        connection.close()
    assert open_store(here.store).get("reports/toy/notes.md") == b"# Notes <script>"


def test_the_reports_are_listed(here: Settings) -> None:
    page = ask(here, "/reports/").body.decode()
    assert (
        '<a href="/reports/toy/evaluation/index.html">' in page and '<a href="/reports/toy/notes.md">' in page
    )
    assert "secret" not in page


def test_the_first_page_says_what_runs_or_that_the_router_is_away(here: Settings) -> None:
    answer = ask(here, "/")
    page = answer.body.decode()
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert f'The router does not answer at <a href="{here.router_url("test")}/">' in page
    for url in (here.prefect_url, here.mlflow_url, f"{here.storefront_url}/reports/"):
        assert f'href="{url}"' in page


def test_a_release_has_a_page_with_its_lineage(here: Settings, journal: Journal) -> None:
    release = journal.record_release(a_release())
    journal.decide(project="toy", environment="test", kind="promoted", release_id=RELEASE)
    answer = ask(here, f"/releases/toy/{RELEASE}")
    page = answer.body.decode()
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    for fact in (RELEASE, "accepted", release.source.git_sha, release.dataset.fingerprint, "promoted test"):
        assert fact in page


def test_what_a_release_says_of_itself_is_text(here: Settings, journal: Journal) -> None:
    rude: dict[str, Any] = {"project": "toy", "repository": "<script>alert(1)</script>", "git_sha": "0" * 40}
    journal.record_release(a_release(release_id="toy-" + "f" * 12, source=rude))
    page = ask(here, f"/releases/toy/toy-{'f' * 12}").body.decode()
    assert "<script>" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/releases/toy/toy-000000000000", "there is no release 'toy-000000000000'"),
        (f"/releases/other/{RELEASE}", f"{RELEASE} is no release of other"),
        ("/releases/toy/%3Cscript%3E", "there is no release '<script>'"),
        ("/releases/toy", "there is nothing at /releases/toy"),
    ],
)
def test_an_unknown_release_is_a_404_that_says_so(
    here: Settings, journal: Journal, path: str, reason: str
) -> None:
    journal.record_release(a_release())
    answer = ask(here, path)
    assert (answer.status, answer.headers["content-type"]) == (404, "application/json")
    assert answer.json()["error"].startswith(reason)


def test_a_journal_that_is_away_is_a_503_with_the_next_step(here: Settings, tmp_path: Path) -> None:
    journal = open_journal(f"sqlite:///{tmp_path / 'journal.db'}")
    (tmp_path / "journal.db").write_bytes(b"no database" * 1000)
    app = create_app(open_store(here.store), journal, here)

    async def get(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.get(path)

    answer = asyncio.run(get(f"/releases/toy/{RELEASE}"))
    assert answer.status_code == 503
    assert "cannot be used" in answer.json()["error"] and "Next: " in answer.json()["error"]
    assert asyncio.run(get("/simple/")).status_code == 200
