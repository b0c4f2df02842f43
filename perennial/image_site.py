"""What of Python a model's image holds: what its lock pins, unpacked for the Python of the image."""

from __future__ import annotations

import platform
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from perennial import process
from perennial.errors import ChildFailed, ProjectError

# What the compiled path imports. No pandas, no scikit-learn, no pyarrow.
COMPILED_DISTRIBUTIONS = (
    "httptools",
    "msgspec",
    "nanoarrow",
    "numpy",
    "obstore",
    "onnxruntime",
    "typing-extensions",  # obstore
    "uvloop",
)

# Of these distributions, what the compiled path never opens. The largest is a second onnxruntime, for
# programs in C, which its Python module does not link to.
_LEFT_OUT = (
    "**/tests",
    "**/*.pyi",
    "**/*.pyx",
    "**/*.pxd",
    "**/*.pxi",
    "**/*.[ch]",
    "**/*.[ch]pp",
    "**/*.a",
    "numpy/f2py",
    "numpy/distutils",
    "numpy/_pyinstaller",
    "numpy/fft",  # these five load at first use, and the server uses none
    "numpy/ma",
    "numpy/polynomial",
    "numpy/random",
    "numpy/testing",
    "numpy/_core/_*_tests.*.so",
    "numpy/_core/_simd.*.so",  # tests of numpy's own
    "onnxruntime/backend",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "onnxruntime/capi/libonnxruntime.so.*",
    "bin",
)
# These say where on the building machine a wheel lay, or list files that are not here.
_OF_THE_BUILD = ("bin", ".lock", "*.dist-info/direct_url.json", "*.dist-info/uv_*.json", "*.dist-info/RECORD")

_GLIBC = "manylinux_2_28"
_TIMEOUT_SECONDS = 1800.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def pins(lock: str, names: Iterable[str]) -> str:
    """The entries of a lock for these distributions, markers and hashes with them.

    Raises ProjectError when the lock lacks one.
    """
    entries = dict[str, list[str]]()
    for entry in _entries(lock):
        if match := _NAME.match(entry):
            entries.setdefault(_normalised(match[0]), []).append(entry)
    wanted = [_normalised(name) for name in names]
    if missing := [name for name in wanted if name not in entries]:
        raise ProjectError(
            f"requirements.lock pins no {', '.join(missing)}, which the image of a compiled model needs",
            f"pins of {', '.join(wanted)}",
            "python -m perennial lock PROJECT, and commit requirements.lock",
        )
    return "".join(entry for name in wanted for entry in entries[name])


def unpack(pinned: str, site: Path, python: str, log: Path) -> None:
    """Install pinned distributions below `site` for Python `python` on Linux; hashes are checked.

    Wheels come from uv's cache or its index, on this machine: the image's own build needs no network.
    Raises ProjectError when one of them is not to be had for that Python.
    """
    requirements = site.with_suffix(".lock")
    requirements.parent.mkdir(parents=True, exist_ok=True)
    requirements.write_text(pinned, encoding="utf-8")
    target = ("--python-version", python, "--python-platform", f"{platform.machine()}-{_GLIBC}")
    _install("--require-hashes", *target, "--requirement", str(requirements), site=site, log=log)


def unpack_wheel(wheel: Path, site: Path, log: Path) -> None:
    """Install a wheel of pure Python below `site`."""
    _install(str(wheel), site=site, log=log)


def leave_out(site: Path) -> None:
    """Remove what the compiled path never opens: files, and what of libraries is for debuggers only."""
    _remove(site, _LEFT_OUT)
    for library in [*site.rglob("*.so"), *site.rglob("*.so.*")]:
        _cut_debug(library)


def _cut_debug(library: Path) -> None:
    """Keep of a 64-bit ELF file what a program header names, which is all that is ever mapped.

    What follows (symbols, debug information, then the section headers) makes nine tenths of uvloop.
    """
    content = library.read_bytes()
    if content[:5] != b"\x7fELF\x02":
        return
    (headers,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    end = headers + size * count
    for number in range(count):
        offset, _, _, length = struct.unpack_from("<QQQQ", content, headers + number * size + 8)
        end = max(end, offset + length)
    kept = bytearray(content[:end])
    kept[40:48] = bytes(8)  # e_shoff, e_shentsize, e_shnum, e_shstrndx: there are no sections
    kept[58:64] = bytes(6)
    library.unlink()  # it may be a link to uv's cache, which must not change
    library.write_bytes(kept)


def _install(*arguments: str, site: Path, log: Path) -> None:
    from uv import find_uv_bin

    site.mkdir(parents=True, exist_ok=True)
    try:
        process.run(
            [find_uv_bin(), "pip", "install", "--quiet", "--no-deps", "--target", str(site), *arguments],
            cwd=log.parent,
            environment=process.scrubbed_environment(network=True),
            timeout_seconds=_TIMEOUT_SECONDS,
            log=log,
            what="uv pip install",
        )
    except ChildFailed as error:
        raise ProjectError(
            f"the image's Python packages cannot be installed: {error.found}",
            "pins whose hashes match what the package index has, for the base image's Python",
            "python -m perennial lock PROJECT, and commit requirements.lock",
        ) from error
    _remove(site, _OF_THE_BUILD)


def _remove(site: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in list(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _entries(lock: str) -> Iterator[str]:
    """Requirements with their continuation lines; comments are left out."""
    entry = ""
    for line in lock.splitlines(keepends=True):
        if line.lstrip().startswith("#"):
            continue
        if entry and not line[:1].isspace():
            yield entry
            entry = ""
        entry += line if line.endswith("\n") else f"{line}\n"
    if entry:
        yield entry


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
