"""What people and package clients may see of the store, over HTTP, read-only: the index and the reports.

/                   what runs where, and where to look further
/simple/…           the package index (PEP 503, PEP 691), with the wheels under /packages/…
/reports/…          pages and plots
/releases/P/ID      what release ID of project P is made of, and where it was deployed
/health
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, cast

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perennial import lineage
from perennial.errors import PerennialError, ReleaseError
from perennial.journal import Journal, open_journal
from perennial.probe import probe
from perennial.settings import Settings, settings
from perennial.store import Store, open_store

if TYPE_CHECKING:
    from starlette.requests import Request

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".whl": "application/zip",
    ".xml": "application/xml",
}
_PYPI_JSON = "application/vnd.pypi.simple.v1+json"

# A report holds text of the project's (column names, test output): whatever it says, it loads nothing from
# elsewhere and sends nothing anywhere.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; font-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_FOREVER = {"cache-control": "public, max-age=31536000, immutable"}
_FRESH = {"cache-control": "no-cache"}


def create_app(store: Store, journal: Journal, settings: Settings) -> Starlette:
    """The ASGI application over one store and one journal."""

    def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def overview(request: Request) -> Response:
        return _page("Perennial", _overview(settings))

    def index(request: Request) -> Response:
        return _object(store, "simple/index.html", _FRESH)

    def project(request: Request) -> Response:
        folder = f"simple/{request.path_params['project']}"
        if _PYPI_JSON in request.headers.get("accept", ""):
            return _object(store, f"{folder}/index.json", _FRESH, _PYPI_JSON)
        return _object(store, f"{folder}/index.html", _FRESH)

    def package(request: Request) -> Response:
        return _object(store, f"packages/{request.path_params['path']}", _FOREVER)

    def report(request: Request) -> Response:
        path = request.path_params["path"]
        return _object(
            store, f"reports/{path}index.html" if path.endswith("/") else f"reports/{path}", _FRESH
        )

    def reports(request: Request) -> Response:
        return _page("Reports", _report_list(store))

    def release(request: Request) -> Response:
        return _release(journal, request.path_params["project"], request.path_params["release_id"])

    return Starlette(
        routes=[
            Route("/", overview),
            Route("/health", health),
            Route("/simple/", index),
            Route("/simple/{project}/", project),
            Route("/packages/{path:path}", package),
            Route("/reports/", reports),
            Route("/reports/{path:path}", report),
            Route("/releases/{project}/{release_id}", release),
        ],
        exception_handlers={404: _unknown, PerennialError: _explained},
    )


def _unknown(request: Request, error: Exception) -> Response:
    return _error(404, f"there is nothing at {request.url.path}")


def _explained(request: Request, error: Exception) -> Response:
    """The store or the journal is away."""
    return _error(503, str(error))


def _error(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status, headers=_HEADERS)


def _object(store: Store, key: str, caching: dict[str, str], media_type: str = "") -> Response:
    try:
        body = store.get(key)
    except (FileNotFoundError, ValueError):  # ValueError: no key of any store, such as one with `..`
        return _error(404, f"there is no {key} in the store")
    kind = media_type or _TYPES.get(PurePosixPath(key).suffix, "application/octet-stream")
    return Response(body, headers={**_HEADERS, **caching, "content-type": kind})


def _release(journal: Journal, project: str, release_id: str) -> Response:
    try:
        text = lineage.of(journal, release_id)
    except ReleaseError as error:
        return _error(404, str(error))
    if release_id.rpartition("-")[0] != project:
        return _error(404, f"{release_id} is no release of {project}")
    return _page(release_id, [f"<pre>{html.escape(text)}</pre>"])


def _overview(settings: Settings) -> list[str]:
    lines = []
    for environment in settings.router_ports:
        url = settings.router_url(environment)
        lines.append(f"<h2>{html.escape(environment)}</h2>")
        services = _services(url)
        if services is None:
            lines.append(f"<p>The router does not answer at {_link(f'{url}/')}.</p>")
        elif not services:
            lines.append("<p>No service yet.</p>")
        else:
            rows = (
                f"<tr><td>{html.escape(name)}</td><td>{html.escape(', '.join(releases))}</td>"
                f"<td>{_link(f'{url}/{name}/')}</td></tr>"
                for name, releases in services.items()
            )
            lines += ["<table><tr><th>service<th>release<th>address</tr>", *rows, "</table>"]
    links = {
        "Runs, schedules and approvals": settings.prefect_url,
        "Models and metrics": settings.mlflow_url,
        "Package index": f"{settings.storefront_url}/simple/",
        "Reports": f"{settings.storefront_url}/reports/",
    }
    return [*lines, "<h2>Look further</h2>", _list(f"{label}: {_link(url)}" for label, url in links.items())]


def _services(url: str) -> dict[str, list[str]] | None:
    """Service → releases as the router lists them; None when it does not answer."""
    answer = probe(f"{url}/", timeout_seconds=1.0)
    if answer is None or answer.status != 200:
        return None
    listing = cast("dict[str, dict[str, list[str]]]", answer.json()["services"])
    return {name: service["releases"] for name, service in listing.items()}


def _report_list(store: Store) -> list[str]:
    pages = [key for key in store.list("reports") if key.endswith((".html", ".md"))]
    if not pages:
        return ["<p>No report yet.</p>"]
    return [_list(_link(f"/{key}", key.removeprefix("reports/")) for key in pages)]


def _page(title: str, lines: Iterable[str]) -> Response:
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td,th{text-align:left;padding:.2rem 1rem .2rem 0}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
    )
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    body = "\n".join(
        [
            f"{head}<style>{style}</style></head><body><h1>{html.escape(title)}</h1>",
            *lines,
            "</body></html>\n",
        ]
    )
    return Response(body, headers={**_HEADERS, **_FRESH, "content-type": _TYPES[".html"]})


def _link(url: str, label: str = "") -> str:
    return f'<a href="{html.escape(url)}">{html.escape(label or url)}</a>'


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def main() -> None:
    """Serve the store and the journal of this installation until told to stop."""
    here = settings()
    store = open_store(here.store, endpoint_url=here.s3_endpoint_url)
    uvicorn.run(
        create_app(store, open_journal(here.database), here),
        host=here.host,
        port=here.storefront_port,
        log_level="warning",
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
