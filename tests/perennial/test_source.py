from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perennial import source
from perennial.errors import ProjectError


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "models" / "toy").mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for number in (1, 2):
        (folder / "models" / "toy" / "file").write_text(str(number))
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", f"{number}")
    git(folder, "tag", "--annotate", "v1", "--message", "v1", "HEAD~1")
    return folder


def test_branches_tags_and_shas_name_commits(repository: Path) -> None:
    newest, first = git(repository, "rev-parse", "HEAD"), git(repository, "rev-parse", "HEAD~1")
    for ref, sha in {"main": newest, "v1": first, first: first}.items():
        assert source.resolve("toy", str(repository), ref).git_sha == sha


def test_a_checkout_holds_the_commit_s_files_and_is_made_once(repository: Path, tmp_path: Path) -> None:
    code = source.resolve("toy", str(repository), "v1", "models/toy")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: source.check_out(code, tmp_path / "checkouts"), range(4)))
    (folder,) = folders
    assert (folder / "file").read_text() == "1"
    (made,) = (tmp_path / "checkouts" / "toy").iterdir()
    assert made.name.startswith(code.git_sha)


def test_a_commit_that_no_branch_reaches_any_more_is_still_checked_out(
    repository: Path, tmp_path: Path
) -> None:
    sha = git(repository, "rev-parse", "HEAD")
    git(repository, "reset", "--quiet", "--hard", "HEAD~1")
    code = source.resolve("toy", str(repository), sha, "models/toy")
    assert (source.check_out(code, tmp_path) / "file").read_text() == "2"


def test_an_unknown_ref_is_explained_with_the_branches_there_are(repository: Path) -> None:
    with pytest.raises(ProjectError, match="no ref 'mian'") as error:
        source.resolve("toy", str(repository), "mian")
    assert "main" in error.value.expected
    assert "git ls-remote" in error.value.next_command


def test_an_unknown_commit_is_explained(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="no commit 0000000"):
        source.check_out(source.resolve("toy", str(repository), "0" * 40), tmp_path / "checkouts")
    assert not list((tmp_path / "checkouts" / "toy").iterdir())


def test_an_unreachable_repository_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="cannot be read"):
        source.resolve("toy", str(tmp_path / "nowhere"), "main")


@pytest.mark.parametrize("subdirectory", ["nowhere", "../.."])
def test_a_subdirectory_lies_within_the_repository(
    repository: Path, tmp_path: Path, subdirectory: str
) -> None:
    code = source.resolve("toy", str(repository), "main", subdirectory)
    with pytest.raises(ProjectError, match="no folder"):
        source.check_out(code, tmp_path / "checkouts")


def test_a_ref_is_never_taken_for_an_option(repository: Path) -> None:
    with pytest.raises(ProjectError, match="no ref"):
        source.resolve("toy", str(repository), "--upload-pack=touch /tmp/owned")
    with pytest.raises(ProjectError, match="cannot be read"):
        source.resolve("toy", "--upload-pack=true", "main")
