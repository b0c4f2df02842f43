from __future__ import annotations

import pickle

import pytest

from perennial import source
from perennial.errors import ChildFailed, PerennialError, ProjectError
from perennial.store import _unusable


@pytest.mark.parametrize("transient", [True, False])
def test_an_error_travels_whole(transient: bool) -> None:
    error = ProjectError("found", "expected", "next", transient=transient)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ProjectError
    assert (copy.found, copy.expected, copy.next_command) == ("found", "expected", "next")
    assert copy.transient is transient
    assert str(copy) == str(error)


@pytest.mark.parametrize(
    ("repository", "transient"), [("http://127.0.0.1:1/x.git", True), ("/no/such/repository", False)]
)
def test_only_a_repository_that_does_not_answer_is_worth_another_try(
    repository: str, transient: bool
) -> None:
    with pytest.raises(ProjectError, match="cannot be read") as error:
        source.resolve("toy", repository, "main")
    assert error.value.transient is transient


@pytest.mark.parametrize(
    ("base", "said", "transient"),
    [
        ("s3://bucket", "Generic S3 error: error sending request: connection refused", True),
        ("s3://bucket", "Generic S3 error: <Code>SlowDown</Code>", True),
        ("s3://bucket", "Generic S3 error: 403 Forbidden <Code>AccessDenied</Code>", False),
        ("s3://bucket", "Generic S3 error: <Code>NoSuchBucket</Code>", False),
        ("file:///store", "No space left on device", False),
    ],
)
def test_only_a_store_that_does_not_answer_is_worth_another_try(
    base: str, said: str, transient: bool
) -> None:
    assert _unusable(base, "read", OSError(said)).transient is transient


def test_what_a_project_s_code_did_is_not_tried_again() -> None:
    assert not ChildFailed("it failed").transient
    assert not PerennialError("anything").transient
