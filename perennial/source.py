"""Git: from a repository and a ref to an immutable checkout of one commit."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from perennial import process
from perennial.errors import ChildFailed, ProjectError
from perennial.values import Source

_TIMEOUT_SECONDS = 300.0
_HISTORY_SECONDS = 30.0
# What git says of a network, as opposed to a repository or a password that is wrong.
_NETWORK_TROUBLE = re.compile(
    r"resolve host|failed to connect|couldn't connect|connection (refused|reset|closed|timed out)|timed out"
    r"|did not end within|early EOF|hung up|unreachable|no route to host|returned error: 5\d\d",
    re.IGNORECASE,
)


def resolve(project: str, repository: str, ref: str, subdirectory: str = "") -> Source:
    """The commit that `ref` (a branch, a tag or a full sha) names in `repository` now.

    Raises ProjectError when the repository cannot be reached or has no such ref.
    """
    if re.fullmatch(r"[0-9a-f]{40}", ref):
        return Source(project=project, repository=repository, git_sha=ref, subdirectory=subdirectory)
    try:
        listing = _git("ls-remote", "--", repository)
    except ChildFailed as error:
        raise _unreachable(repository, error) from error
    refs = {name: sha for sha, name in (line.split("\t") for line in listing.splitlines())}
    # An annotated tag's commit is listed as NAME^{}; the plain name is the tag object.
    for name in (f"refs/heads/{ref}", f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}", ref):
        if name in refs:
            return Source(
                project=project, repository=repository, git_sha=refs[name], subdirectory=subdirectory
            )
    branches = sorted(name.removeprefix("refs/heads/") for name in refs if name.startswith("refs/heads/"))
    raise ProjectError(
        f"repository {repository} has no ref {ref!r}",
        f"a branch, a tag or a full commit sha; its branches: {', '.join(branches[:10]) or 'none'}",
        f"git ls-remote {repository}",
    )


def check_out(source: Source, checkouts: Path) -> Path:
    """The project's folder at that commit, under `checkouts`; made once, then reused.

    Raises ProjectError when the commit or the subdirectory does not exist.
    """
    repository = hashlib.sha256(source.repository.encode()).hexdigest()[:8]
    folder = checkouts / source.project / f"{source.git_sha}-{repository}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        try:
            _fetch(source, fresh)
            fresh.rename(folder)  # atomic: a checkout is there whole or not at all
        except FileExistsError:
            pass  # another run was first; its checkout is the same commit
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    os.utime(folder)  # asked for now (see caches.py)
    project = (folder / source.subdirectory).resolve()
    if not project.is_relative_to(folder.resolve()) or not project.is_dir():
        raise ProjectError(
            f"commit {source.git_sha[:12]} has no folder {source.subdirectory!r}",
            "the project's folder within the repository",
        )
    return project


def subjects(old: Source, new: Source) -> list[str]:
    """The first lines of the commits that `new` has and `old` has not, newest first.

    Raises ProjectError when the repository cannot be reached, or has one of them no more.
    """
    with tempfile.TemporaryDirectory(prefix="perennial-history-") as folder:
        here = Path(folder)
        commits = (old.git_sha, new.git_sha)
        try:
            _git("init", "--quiet", "--bare", cwd=here)
            # Commits only, where the server can: no files are needed.
            fetch = ("fetch", "--quiet", "--no-tags", "--filter=tree:0", "--", new.repository)
            _git(*fetch, *commits, cwd=here, seconds=_HISTORY_SECONDS)
            between = f"{old.git_sha}..{new.git_sha}"
            listed = _git("log", "--format=%h %s", between, cwd=here, seconds=_HISTORY_SECONDS)
        except ChildFailed as error:
            raise _unreachable(new.repository, error) from error
    return listed.splitlines()


def _fetch(source: Source, folder: Path) -> None:
    _git("init", "--quiet", cwd=folder)
    try:
        _git(
            "fetch", "--quiet", "--depth=1", "--no-tags", "--", source.repository, source.git_sha, cwd=folder
        )
    except ChildFailed as error:
        if "not our ref" in error.found or "couldn't find remote ref" in error.found:
            raise ProjectError(
                f"repository {source.repository} has no commit {source.git_sha}",
                "a commit that a branch or tag of the repository reaches",
                f"git ls-remote {source.repository}",
            ) from error
        raise _unreachable(source.repository, error) from error
    _git("-c", "advice.detachedHead=false", "checkout", "--quiet", "FETCH_HEAD", cwd=folder)
    shutil.rmtree(folder / ".git")


def _unreachable(repository: str, error: ChildFailed) -> ProjectError:
    reason = error.found.splitlines()[-1] if error.found else "git gave no reason"
    return ProjectError(
        f"repository {repository} cannot be read: {reason}",
        "a path or URL that `git ls-remote` reads with no password prompt",
        f"git ls-remote {repository}",
        transient=_NETWORK_TROUBLE.search(error.found) is not None,
    )


def _git(*arguments: str, cwd: Path | None = None, seconds: float = _TIMEOUT_SECONDS) -> str:
    environment = process.scrubbed_environment(
        network=True,
        GIT_TERMINAL_PROMPT="0",
        GIT_CONFIG_NOSYSTEM="1",
        # A repository of another user (a server's bare one) is read, never executed in.
        GIT_CONFIG_COUNT="3",
        GIT_CONFIG_KEY_0="safe.directory",
        GIT_CONFIG_VALUE_0="*",
        GIT_CONFIG_KEY_1="uploadpack.allowAnySHA1InWant",
        GIT_CONFIG_VALUE_1="true",
        GIT_CONFIG_KEY_2="uploadpack.allowFilter",
        GIT_CONFIG_VALUE_2="true",
    )
    return process.capture(
        ["git", *arguments], cwd=cwd or Path.cwd(), environment=environment, timeout_seconds=seconds
    )
