"""A release exists once, as it was first written, and is put on disk whole or not at all."""

from __future__ import annotations

import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from perennial import artifacts, index, releases
from perennial.config import Project, ProjectConfig
from perennial.errors import InstallationError, ReleaseError
from perennial.journal import Journal, open_journal
from perennial.store import Store
from perennial.values import Gate, GateReport, Release, ServiceLimits, Verdict
from serving import contract
from tests.releases import FORM, MODEL, SHA, a_form, a_release, a_stored_release, a_wheel, an_artifact

KEY = "releases/toy/toy-0123456789ab/release.json"
OTHER = "f" * 64
FAILED = Gate(
    name="roc_auc", verdict=Verdict.FAIL, measured=0.61, threshold=0.65, interval=None, reason="too low"
)
UNSURE = Gate(
    name="champion", verdict=Verdict.INSUFFICIENT, measured=None, threshold=None, reason="too few days"
)


@pytest.fixture
def store(directory_store: Store) -> Store:
    return directory_store


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return open_journal(f"sqlite:///{tmp_path / 'journal.db'}")


@pytest.fixture
def release(store: Store, tmp_path: Path) -> Release:
    return a_stored_release(store, tmp_path / "built")


# draft_release


def draft(**changes: Any) -> Release:
    """A draft of what `a_release` is made of, with `changes` to these parts."""
    base = a_release()
    parts: dict[str, Any] = {
        "code": base.source,
        "contract": Project(
            name="toy",
            package="toy",
            version="1.0",
            requires=(),
            config=ProjectConfig(task="binary", target="y"),
        ),
        "environment": base.environment,
        "dataset": base.dataset,
        "tests": base.tests,
        "model": base.model,
        "evaluation": base.evaluation,
        "gates": base.gates,
    }
    return releases.draft_release(**(parts | changes))


def test_the_same_content_gives_the_same_id_at_any_time() -> None:
    first, second = draft(), draft()
    assert first.release_id == second.release_id
    assert first.release_id.startswith("toy-") and len(first.release_id) == len("toy-") + 12
    assert first.created_at.tzinfo is UTC and first.created_at < second.created_at


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("code", "git_sha", "f" * 40),
        ("code", "subdirectory", "projects/toy"),
        ("dataset", "fingerprint", OTHER),
        ("dataset", "as_of", date(2024, 6, 2)),
        ("environment", "fingerprint", OTHER),
        ("model", "seed", 1),
        ("model", "artifact", an_artifact("model/").model_copy(update={"sha256": OTHER})),
        ("model", "input_schema", an_artifact("schema.json").model_copy(update={"sha256": OTHER})),
    ],
)
def test_each_changed_ingredient_changes_the_id(part: str, field: str, value: object) -> None:
    names = {"code": "source"}
    base = getattr(a_release(), names.get(part, part))
    assert draft(**{part: base.model_copy(update={field: value})}).release_id != draft().release_id


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("code", "repository", "/a/mirror"),
        ("dataset", "uri", "file:///elsewhere"),
        ("model", "train_seconds", 99.0),
        ("tests", "report", an_artifact("other.xml")),
        ("evaluation", "report", an_artifact("page/")),
    ],
)
def test_where_and_how_long_do_not_change_the_id(part: str, field: str, value: object) -> None:
    names = {"code": "source"}
    base = getattr(a_release(), names.get(part, part))
    assert draft(**{part: base.model_copy(update={field: value})}).release_id == draft().release_id


def test_an_approval_is_of_the_form_that_is_served_too() -> None:
    plain, compiled = a_release(), a_release(serving=a_form())
    assert plain.digest() != compiled.digest() != a_release(serving=a_form(path="original")).digest()


def test_a_release_of_an_earlier_version_keeps_its_digest_and_so_its_approval() -> None:
    assert a_release().digest() == "e95efa3c656a4f3a92182de55ae8acdf3dbe2721bcf1795f7cfd6ea78ba91884"
    assert Release.model_validate_json(a_release().model_dump_json()) == a_release()


def test_two_projects_never_share_an_id() -> None:
    other = a_release().source.model_copy(update={"project": "other"})
    assert draft(code=other).release_id.startswith("other-")


@pytest.mark.parametrize("gates", [(), (FAILED,), (*a_release().gates.gates, UNSURE)])
def test_only_a_report_that_is_all_pass_accepts(gates: tuple[Gate, ...]) -> None:
    assert draft().status == "accepted"
    assert draft(gates=GateReport(gates=gates)).status == "rejected"


# write


def test_a_written_release_is_in_the_store_and_in_the_journal(store: Store, journal: Journal) -> None:
    assert releases.write(store, journal, a_release()) == a_release()
    assert Release.model_validate_json(store.get(KEY)) == a_release()
    assert journal.releases() == [a_release()]


def test_writing_again_gives_the_first_back(store: Store, journal: Journal) -> None:
    releases.write(store, journal, a_release())
    again = releases.write(store, journal, a_release(created_at=datetime(2025, 1, 1, tzinfo=UTC)))
    assert again == a_release() and journal.releases() == [a_release()]


def test_a_crash_between_store_and_journal_leaves_no_release_and_the_next_try_the_first_document(
    store: Store, journal: Journal, tmp_path: Path
) -> None:
    away = open_journal(f"sqlite:///{tmp_path / 'away.db'}")
    (tmp_path / "away.db").unlink()
    (tmp_path / "away.db").mkdir()  # the database goes after it was opened
    with pytest.raises(InstallationError):
        releases.write(store, away, a_release())
    assert store.exists(KEY) and journal.releases() == []
    with pytest.raises(ReleaseError, match="no release"):
        releases.find(journal, "toy", a_release().release_id)
    again = releases.write(store, journal, a_release(created_at=datetime(2025, 1, 1, tzinfo=UTC)))
    assert again == a_release() == journal.release(a_release().release_id)


def test_a_store_that_fails_leaves_nothing_in_the_journal(
    store: Store, journal: Journal, tmp_path: Path
) -> None:
    (tmp_path / "a store" / "releases").touch()
    with pytest.raises(InstallationError, match="could not write"):
        releases.write(store, journal, a_release())
    assert journal.releases() == []


def test_many_that_write_one_release_get_the_same(store: Store, journal: Journal) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(
            pool.map(lambda n: releases.write(store, journal, a_release(mlflow_version=str(n))), range(8))
        )
    assert len({one.mlflow_version for one in written}) == 1
    assert journal.releases() == written[:1]
    assert Release.model_validate_json(store.get(KEY)) == written[0]


@pytest.mark.parametrize(("first", "second"), [("accepted", "rejected"), ("rejected", "accepted")])
def test_a_release_is_never_judged_twice(store: Store, journal: Journal, first: str, second: str) -> None:
    releases.write(store, journal, a_release(status=first))
    with pytest.raises(ReleaseError, match=f"written as {first}, and is {second} now"):
        releases.write(store, journal, a_release(status=second))
    # And where the store lost its document:
    store.delete(KEY)
    with pytest.raises(ReleaseError, match=f"recorded as {first} .* and is {second} now"):
        releases.write(store, journal, a_release(status=second))
    assert [one.status for one in journal.releases()] == [first]


# find


def recorded(journal: Journal, number: int, **changes: Any) -> Release:
    moment = datetime(2024, 6, 1 + number, tzinfo=UTC)
    fields = {"release_id": f"toy-{number:012x}", "created_at": moment, **changes}
    return journal.record_release(a_release(**fields))


def test_the_newest_accepted_release_is_found_and_any_by_its_id(journal: Journal) -> None:
    first, second = recorded(journal, 1), recorded(journal, 2)
    recorded(journal, 3, status="rejected", gates=GateReport(gates=(FAILED,)))
    assert releases.find(journal, "toy") == second
    assert releases.find(journal, "toy", first.release_id) == first


def test_without_an_accepted_release_it_says_what_there_is(journal: Journal) -> None:
    with pytest.raises(ReleaseError, match="toy has no accepted release\n") as refused:
        releases.find(journal, "toy")
    assert refused.value.next_command == "prefect deployment run 'build/toy'"
    rejected = recorded(journal, 3, status="rejected", gates=GateReport(gates=(FAILED,)))
    with pytest.raises(ReleaseError, match=f"the newest, {rejected.release_id}, was rejected"):
        releases.find(journal, "toy")


def test_an_unknown_id_is_refused_with_near_ones(journal: Journal) -> None:
    with pytest.raises(ReleaseError, match="toy has no release 'toy-1'") as refused:
        releases.find(journal, "toy", "toy-1")
    assert refused.value.next_command == "prefect deployment run 'build/toy'"
    for number in range(8):
        recorded(journal, number)
    with pytest.raises(ReleaseError) as refused:
        releases.find(journal, "toy", "toy-00000000003")
    near = refused.value.expected.removeprefix("one of: ").split(", ")
    assert near[0] == "toy-000000000003" and len(near) == 5


def test_a_release_of_another_project_is_unknown(journal: Journal) -> None:
    recorded(journal, 1)
    with pytest.raises(ReleaseError, match="other has no release 'toy-000000000001'"):
        releases.find(journal, "other", "toy-000000000001")


def test_a_rejected_release_is_refused_with_the_gates_that_did_not_pass(journal: Journal) -> None:
    gates = GateReport(gates=(*a_release().gates.gates, FAILED, UNSURE))
    rejected = recorded(journal, 1, status="rejected", gates=gates)
    with pytest.raises(ReleaseError, match="was rejected by") as refused:
        releases.find(journal, "toy", rejected.release_id)
    assert "gate roc_auc: fail, measured 0.61, threshold 0.65, too low" in refused.value.found
    assert "gate champion: insufficient evidence" in refused.value.found
    assert "good" not in refused.value.found


# materialise


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_release_folder_holds_what_a_server_reads(store: Store, release: Release, tmp_path: Path) -> None:
    release = release.model_copy(update={"service": ServiceLimits(max_rows=7, drain_seconds=3, workers=2)})
    folder = releases.materialise(store, release, tmp_path / "releases")
    assert folder == tmp_path / "releases" / release.release_id
    files = contents(folder)
    assert {name.removeprefix("model/"): data for name, data in files.items() if "model/" in name} == MODEL
    assert {name.removeprefix("serving/"): data for name, data in files.items() if "serving/" in name} == FORM
    assert files["site/toy.py"] == b"VERSION = '1.0'\n"
    assert {name.split("/")[0] for name in files} == {
        *("manifest.json", "schema.json", "golden.json", "model", "serving", "site")
    }
    manifest = msgspec.json.decode(files["manifest.json"], type=contract.Manifest)
    assert manifest == contract.Manifest(
        release_id=release.release_id,
        project="toy",
        package="toy",
        task="binary",
        git_sha=SHA[:40],
        data_fingerprint=SHA,
        as_of="2024-06-01",
        model_sha256=release.model.artifact.sha256,
        limits=contract.Limits(max_rows=7, drain_seconds=3, workers=2),
    )
    assert [path.name for path in (tmp_path / "releases").iterdir()] == [release.release_id]


def test_a_release_of_before_there_was_a_form_gets_a_folder_without_one(
    store: Store, release: Release, tmp_path: Path
) -> None:
    old = release.model_copy(update={"serving": None})
    assert '"serving":{"path"' not in old.model_dump_json()
    folder = releases.materialise(store, old, tmp_path / "releases")
    assert not (folder / contract.SERVING_DIRECTORY).exists()
    limits = msgspec.json.decode((folder / contract.MANIFEST_FILE).read_bytes())["limits"]
    known = {"max_rows", "max_body_bytes", "max_concurrent_requests", "drain_seconds"}
    assert set(limits) == known, "its own server refuses a key that came later"


@pytest.mark.parametrize("part", ["artifact", "input_schema", "golden", "form", "wheel"])
@pytest.mark.parametrize("accident", ["altered", "lost"])
def test_a_release_that_is_not_what_was_released_never_reaches_the_disk(
    store: Store, release: Release, tmp_path: Path, part: str, accident: str
) -> None:
    assert release.package is not None and release.serving is not None
    if part == "wheel":
        key = store.key(index.artifact(store, release.package).uri)
    elif part == "form":
        key = f"{store.key(release.serving.artifact.uri)}/model.onnx"
    else:
        key = store.key(getattr(release.model, part).uri) + ("/model.skops" if part == "artifact" else "")
    store.put_bytes(key, bytes(store.size(key))) if accident == "altered" else store.delete(key)
    with pytest.raises(
        ReleaseError, match=r"was altered|is not in the store|is not on the package index"
    ) as refused:
        releases.materialise(store, release, tmp_path / "releases")
    assert refused.value.expected and refused.value.next_command
    assert list((tmp_path / "releases").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../outside.py", "/tmp/outside.py", "toy/../../outside.py", "..\\outside.py", "link"],
)
def test_a_wheel_that_would_write_outside_its_folder_is_refused(
    store: Store, release: Release, tmp_path: Path, name: str
) -> None:
    wheel = a_wheel(tmp_path / "evil", version="6.6.6")
    with zipfile.ZipFile(wheel, "a") as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = (0o120777 if name == "link" else 0o100644) << 16
        archive.writestr(member, "/etc/passwd")
    evil = release.model_copy(update={"package": index.publish(store, wheel)})
    with pytest.raises(ReleaseError, match=r"toy-6\.6\.6.* would write outside its folder") as refused:
        releases.materialise(store, evil, tmp_path / "releases")
    assert repr(name) in refused.value.found
    assert list((tmp_path / "releases").iterdir()) == []
    assert not list(tmp_path.rglob("outside.py")) and not Path("/tmp/outside.py").exists()


def test_a_wheel_that_was_broken_before_it_was_published_is_refused(
    store: Store, release: Release, tmp_path: Path
) -> None:
    wheel = a_wheel(tmp_path / "broken", version="6.6.6", files={"toy.py": b"the module"})
    wheel.write_bytes(wheel.read_bytes().replace(b"the module", b"not module"))
    broken = release.model_copy(update={"package": index.publish(store, wheel)})
    with pytest.raises(ReleaseError, match=r"toy-6\.6\.6.* cannot be unpacked: Bad CRC-32"):
        releases.materialise(store, broken, tmp_path / "releases")
    assert list((tmp_path / "releases").iterdir()) == []


def test_a_whole_folder_is_used_again_with_what_running_it_added(
    store: Store, release: Release, tmp_path: Path
) -> None:
    folder = releases.materialise(store, release, tmp_path / "releases")
    before = {path: path.stat().st_ino for path in folder.rglob("*")}
    (folder / "site" / "__pycache__").mkdir()
    (folder / "site" / "__pycache__" / "toy.cpython-311.pyc").write_bytes(b"compiled")
    assert releases.materialise(store, release, tmp_path / "releases") == folder
    assert {path: path.stat().st_ino for path in before} == before
    assert (folder / "site" / "__pycache__" / "toy.cpython-311.pyc").exists()


def test_a_way_to_serve_that_the_release_does_not_have_is_removed(
    store: Store, release: Release, tmp_path: Path
) -> None:
    old = release.model_copy(update={"serving": None})
    folder = releases.materialise(store, old, tmp_path / "releases")
    (folder / "serving").mkdir()
    (folder / "serving" / "plan.json").write_bytes(b"{}")
    assert releases.materialise(store, old, tmp_path / "releases") == folder
    assert not (folder / "serving").exists()


@pytest.mark.parametrize(
    "name",
    ["model/model.skops", "schema.json", "golden.json", "manifest.json", "serving/plan.json", "site/toy.py"],
)
@pytest.mark.parametrize("accident", ["altered", "lost"])
def test_a_damaged_folder_is_repaired(
    store: Store, release: Release, tmp_path: Path, name: str, accident: str
) -> None:
    folder = releases.materialise(store, release, tmp_path / "releases")
    whole = contents(folder)
    (folder / name).write_bytes(b"damaged") if accident == "altered" else (folder / name).unlink()
    assert releases.materialise(store, release, tmp_path / "releases") == folder
    assert contents(folder) == whole
    assert [path.name for path in (tmp_path / "releases").iterdir()] == [release.release_id]


def test_a_damaged_folder_stays_until_there_is_a_whole_one(
    store: Store, release: Release, tmp_path: Path
) -> None:
    folder = releases.materialise(store, release, tmp_path / "releases")
    (folder / "schema.json").unlink()
    store.delete(store.key(release.model.golden.uri))
    before = contents(folder)
    with pytest.raises(ReleaseError):
        releases.materialise(store, release, tmp_path / "releases")
    assert contents(folder) == before


@pytest.mark.parametrize("damaged", [False, True])
def test_many_may_materialise_one_release_at_once(
    store: Store, release: Release, tmp_path: Path, damaged: bool
) -> None:
    whole = contents(releases.materialise(store, release, tmp_path / "elsewhere"))
    root = tmp_path / "releases"
    for _ in range(5):
        if damaged:
            (releases.materialise(store, release, root) / "schema.json").write_bytes(b"damaged")
        with ThreadPoolExecutor(8) as pool:
            folders = set(pool.map(lambda _: releases.materialise(store, release, root), range(8)))
        assert folders == {root / release.release_id} and contents(folders.pop()) == whole
    assert [path.name for path in root.iterdir()] == [release.release_id]


def test_who_replaces_a_folder_waits_for_who_is_replacing_it(
    store: Store, release: Release, tmp_path: Path
) -> None:
    root = tmp_path / "releases"
    folder = releases.materialise(store, release, root)
    schema = (folder / "schema.json").read_bytes()
    (folder / "schema.json").write_bytes(b"damaged")
    with ThreadPoolExecutor(1) as pool:
        with artifacts.alone_in(root):
            waiting = pool.submit(releases.materialise, store, release, root)
            time.sleep(0.3)
            assert not waiting.done() and (folder / "schema.json").read_bytes() == b"damaged"
            (folder / "schema.json").write_bytes(schema)
            repaired = folder.stat().st_ino
        assert waiting.result(10) == folder and folder.stat().st_ino == repaired


def test_what_has_no_package_cannot_be_put_on_disk(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="was rejected and has no package") as refused:
        releases.materialise(store, a_release(status="rejected"), tmp_path / "releases")
    assert refused.value.next_command == "prefect deployment run 'build/toy'"
    assert not (tmp_path / "releases").exists()
