from __future__ import annotations

import os
from pathlib import Path

import pytest

from perennial.errors import ProjectError
from perennial.project import check_links, check_lock, check_model, check_project

HASH = "--hash=sha256:" + "0" * 64
METHODS = "    def produce_model(self, data): ...\n    def predict(self, rows): ...\n"
LOADER = "def load_data(as_of): ...\n"


def package(root: Path, **modules: str) -> Path:
    folder = root / "src" / "toy"
    folder.mkdir(parents=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return root / "src"


def test_a_model_defined_in_place_or_imported_from_within_is_found(tmp_path: Path) -> None:
    check_model(package(tmp_path / "a", __init__=f"class Model:\n{METHODS}{LOADER}"), "toy")
    elsewhere = package(
        tmp_path / "b",
        __init__="from toy.model import Model\nfrom .data import load as load_data\n",
        model=f"class Base:\n{METHODS}class Model(Base): ...\n",
        data="def load(as_of): ...\n",
    )
    check_model(elsewhere, "toy")


def test_a_base_class_of_another_library_is_left_to_the_project_s_own_environment(tmp_path: Path) -> None:
    source = package(tmp_path, __init__=f"from lib import Base\nclass Model(Base): ...\n{LOADER}")
    check_model(source, "toy")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LOADER, "exports no class Model"),
        (f"Model = 3\n{LOADER}", "exports no class Model"),
        (f"class Model:\n    def predict(self, rows): ...\n{LOADER}", "no method produce_model"),
        (f"class Model:\n    def produce_model(self, data): ...\n{LOADER}", "no method predict"),
        (f"class Model:\n{METHODS}", "no function load_data"),
        ("class Model\n", "line 1"),
    ],
)
def test_what_is_missing_is_named_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ProjectError, match=says) as error:
        check_model(package(tmp_path, __init__=text), "toy")
    assert "src/toy/__init__.py" in str(error.value)


def test_nothing_of_the_project_is_executed(tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Model:\n{METHODS}{LOADER}"
    check_model(package(tmp_path, __init__=trap), "toy")
    assert not (tmp_path / "executed").exists()


def lock(folder: Path, *lines: str) -> Path:
    (folder / "requirements.lock").write_text("\n".join(lines) + "\n")
    return folder


def test_a_lock_that_holds_every_requirement_is_accepted(tmp_path: Path) -> None:
    check_lock(
        lock(tmp_path, f"pandas==2.3.3 \\\n    {HASH}", f"Zope.Interface==7.0 {HASH}  # via x"),
        ("pandas>=2,<3", "zope-interface", "colorama; sys_platform == 'win32'"),
    )


@pytest.mark.parametrize(
    ("lines", "requires", "says"),
    [
        (["pandas==2.3.3 " + HASH], "polars>=1", "does not hold polars"),
        (["pandas==2.3.3 " + HASH], "pandas<2.3", "pins pandas==2.3.3"),
        (["pandas==2.3.3"], "pandas", "no hash"),
        (["pandas>=2 " + HASH], "pandas", "no hash"),
        (["--index-url https://elsewhere"], "pandas", "the option"),
        (["./local.whl"], "pandas", "local.whl"),
        (["pandas==2.3.3 ; sys_platform == 'win32' " + HASH], "pandas", "does not hold pandas"),
    ],
)
def test_a_lock_that_does_not_match_is_refused(
    tmp_path: Path, lines: list[str], requires: str, says: str
) -> None:
    with pytest.raises(ProjectError, match=says) as error:
        check_lock(lock(tmp_path, *lines), (requires,))
    assert "requirements.lock" in str(error.value)
    assert "python -m perennial lock" in str(error.value)


def test_a_missing_lock_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"requirements\.lock does not exist"):
        check_lock(tmp_path, ())


def test_a_package_that_hides_a_module_of_python_s_own_is_refused(tmp_path: Path) -> None:
    package(tmp_path, __init__=f"class Model:\n{METHODS}{LOADER}")
    (tmp_path / "src" / "toy").rename(tmp_path / "src" / "random")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "random"\nversion = "1"\n[tool.perennial]\ntask = "binary"\ntarget = "y"\n'
    )
    with pytest.raises(ProjectError, match="'random' has the name of a module of Python's own"):
        check_project(tmp_path, "random", ())


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "requirements.lock", "expectations.json", "src/toy", "src"]
)
def test_a_link_that_leaves_the_project_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    link = tmp_path / "project" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(tmp_path / "outside", link.parent))
    with pytest.raises(ProjectError, match=f"{name} is a symbolic link that leaves"):
        check_project(tmp_path / "project", "toy", ())


def test_a_link_within_the_project_is_none_of_our_business_but_a_loop_and_an_absolute_one_are(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "here").symlink_to("data")
    check_links(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ProjectError, match="loop"):
        check_links(tmp_path)
    (tmp_path / "loop").unlink()
    (tmp_path / "absolute").symlink_to(tmp_path / "data")
    with pytest.raises(ProjectError, match="absolute"):
        check_links(tmp_path)
