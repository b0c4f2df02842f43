"""Does a checkout keep the contract? Read, never imported: its code runs in its own environment only."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from perennial.config import Project, read_project
from perennial.errors import ProjectError

LOCK_FILE = "requirements.lock"
_METHODS = ("produce_model", "predict")


def check_project(folder: Path, name: str, serving_requires: tuple[str, ...]) -> Project:
    """Read the project in `folder` and check it: its name, its `Model`, its lock.

    `serving_requires`: what the serving wheel needs, which the project's lock must hold too.
    Raises ProjectError naming the file, what was found and what is expected.
    """
    check_links(folder)
    project = read_project(folder)
    if project.name != name:
        raise ProjectError(
            f"pyproject.toml: project.name is {project.name!r}", f"{name!r}, the name it is enabled under"
        )
    if project.package in sys.stdlib_module_names:
        raise ProjectError(
            f"the package {project.package!r} has the name of a module of Python's own",
            "a name that hides nothing: the project's code would import the wrong one",
        )
    check_model(folder / "src", project.package)
    check_lock(folder, (*project.requires, *serving_requires))
    return project


def check_links(folder: Path) -> None:
    """No symbolic link leads out of the project: it would bring files of this machine into a package."""
    home = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in sorted((*folders, *files))):
            if path.is_symlink() and not _ends_within(path, home):
                raise ProjectError(
                    f"{path.relative_to(folder)} is a symbolic link that leaves the project",
                    "files of the project, or links to them",
                )


def _ends_within(link: Path, home: Path) -> bool:
    try:
        return not link.readlink().is_absolute() and link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # it leads to itself
        return False


def check_model(source: Path, package: str) -> None:
    """`src/PACKAGE` exports a class `Model` with both methods, and a function `load_data`."""
    home = source / package / "__init__.py"
    shown = f"src/{package}/__init__.py"
    if not home.is_file():
        raise ProjectError(
            f"{shown} does not exist", f"the package {package!r}, exporting Model and load_data"
        )
    model = _find(source, f"{package}", "Model")
    if not isinstance(model, ast.ClassDef):
        raise ProjectError(
            f"{shown} exports no class Model",
            "a class Model with produce_model(self, data) and predict(self, rows)",
        )
    has = _methods(source, package, model)
    for method in _METHODS:
        if has is not None and method not in has:
            raise ProjectError(
                f"{shown}: Model has no method {method}",
                "produce_model(self, data) and predict(self, rows)",
            )
    if not isinstance(_find(source, package, "load_data"), ast.FunctionDef):
        raise ProjectError(
            f"{shown} exports no function load_data", "load_data(as_of: datetime.date) -> pandas.DataFrame"
        )


def check_lock(folder: Path, requires: tuple[str, ...]) -> None:
    """requirements.lock pins, with hashes, every direct requirement of the project and of serving."""
    path = folder / LOCK_FILE
    remedy = f"python -m perennial lock {folder.name}, and commit {LOCK_FILE}"
    if not path.is_file():
        raise ProjectError(f"{LOCK_FILE} does not exist", "a lock with hashes beside pyproject.toml", remedy)
    pins = _pins(path.read_text(encoding="utf-8"), remedy)
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise ProjectError(f"pyproject.toml: {text!r} is not a requirement: {error}") from error
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        versions = pins.get(canonicalize_name(requirement.name), set())
        if not versions:
            raise ProjectError(f"{LOCK_FILE} does not hold {requirement.name}", f"a pin for {text}", remedy)
        if not any(requirement.specifier.contains(version, prereleases=True) for version in versions):
            found = ", ".join(sorted(str(version) for version in versions))
            raise ProjectError(
                f"{LOCK_FILE} pins {requirement.name}=={found}", f"{text}, as required", remedy
            )


def _pins(text: str, remedy: str) -> dict[str, set[Version]]:
    """name → the versions that apply to this interpreter; every pin must carry a hash."""
    pins: dict[str, set[Version]] = {}
    environment = {key: str(value) for key, value in default_environment().items()} | {"extra": ""}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        entry = line.split(" #")[0].strip()
        if not entry or entry.startswith("#"):
            continue
        if entry.startswith("-"):
            raise ProjectError(
                f"{LOCK_FILE} holds the option {entry!r}", "pins with hashes, no options", remedy
            )
        head = entry.split(" --hash=")[0].strip()
        try:
            requirement = Requirement(head)
            (pin,) = requirement.specifier
        except (InvalidRequirement, ValueError) as error:
            raise ProjectError(f"{LOCK_FILE} holds {head!r}", "NAME==VERSION with hashes", remedy) from error
        if pin.operator != "==" or "--hash=" not in entry:
            raise ProjectError(f"{LOCK_FILE}: {head!r} has no hash", "NAME==VERSION with hashes", remedy)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(requirement.name), set()).add(Version(pin.version))
    return pins


def _find(source: Path, module: str, name: str, depth: int = 5) -> ast.stmt | None:
    """The definition of `name` in `module`, following imports within the package."""
    path = _module_file(source, module)
    if path is None or depth == 0:
        return None
    for statement in _parse(path, source).body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
            return statement
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _find(source, _imported(module, path, statement), alias.name, depth - 1)
    return None


def _methods(source: Path, package: str, model: ast.ClassDef) -> set[str] | None:
    """The methods of a class and of its bases in the package; None if a base lies outside it."""
    found = {s.name for s in model.body if isinstance(s, ast.FunctionDef)}
    for base in model.bases:
        parent = _find_anywhere(source, package, base.id) if isinstance(base, ast.Name) else None
        if parent is None:
            return None  # a class of another library: the project's own environment will tell
        inherited = _methods(source, package, parent)
        if inherited is None:
            return None
        found |= inherited
    return found


def _find_anywhere(source: Path, package: str, name: str) -> ast.ClassDef | None:
    for path in sorted((source / package).rglob("*.py")):
        for statement in _parse(path, source).body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return statement
    return None


def _imported(module: str, path: Path, statement: ast.ImportFrom) -> str:
    if statement.level == 0:
        return statement.module or ""
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    parts = parts[: len(parts) - (statement.level - 1)]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


def _module_file(source: Path, module: str) -> Path | None:
    stem = source.joinpath(*module.split("."))
    for path in (stem / "__init__.py", stem.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _parse(path: Path, source: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        where = f"src/{path.relative_to(source)}"
        line = getattr(error, "lineno", None)
        raise ProjectError(f"{where}, line {line}: {error}", "Python that parses") from error
