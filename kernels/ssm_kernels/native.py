"""Compiles native C++ for the CPU into a shared library, once a machine, and loads it with ctypes.

The sources see plain pointers and sizes, no torch headers, so a build takes seconds. The library is cached under a
key made of everything that decides its machine code; a file lock makes the first of several processes that start
together build it and the others wait. Environment: `CXX` names the compiler (g++, or one that takes its options and
whose OpenMP is libgomp: clang++ calls another), `SSM_KERNELS_CACHE` the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    # Vectors of 64 bytes are lowered to what the machine has; nothing passes one across a library boundary.
    "-Wno-psabi",
)
BUILD_TIMEOUT_SECONDS = 300.0


class NativeBuildError(RuntimeError):
    """The native library cannot be built or loaded here; the message says why."""


def load_library(name: str, sources: Sequence[Path], headers: Sequence[Path] = ()) -> ctypes.CDLL:
    """Return the shared library built from `sources`, building it if no process has done so on this machine.

    Args:
        name: what the library is called in the cache.
        sources: C++ files, each compiled by itself and linked together.
        headers: files that the sources include; a change in one causes a new build.

    Raises:
        NativeBuildError: there is no compiler or no cache folder, the compiler failed, the disk is full or takes no
            locks, or the library does not load.
    """
    compiler = find_compiler()
    folder = cache_folder()
    try:
        library = folder / f"{name}-{_build_key(compiler, [*sources, *headers])}.so"
        if not library.exists():
            with FileLock(library.with_suffix(".lock"), timeout=BUILD_TIMEOUT_SECONDS):
                if not library.exists():
                    _build(compiler, sources, library)
    except Timeout as error:
        raise NativeBuildError(
            f"another process has been building {library.name} for {BUILD_TIMEOUT_SECONDS:.0f} s; "
            f"if none is running, delete {folder}"
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter from filelock where a file system has no locks
        raise NativeBuildError(f"{name} cannot be built with {compiler} in {folder}: {error}") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeBuildError(f"{library} does not load: {error}") from error


def find_compiler() -> str:
    """Path of the C++ compiler: `$CXX`, else g++. Raises NativeBuildError if it is not there."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise NativeBuildError(f"no C++ compiler found (looked for {name}); install g++ or set CXX")
    return path


def cache_folder() -> Path:
    """Folder of the built libraries, made if it is not there: `$SSM_KERNELS_CACHE`, else one in the user's cache, else
    (no home, or a read-only one) a private temporary one.

    Raises:
        NativeBuildError: none can be written, or the temporary one is not the user's alone.
    """
    refused = []
    for folder, in_temporary in _cache_candidates():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if in_temporary:
                _check_private(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError("not writable")
        except OSError as error:
            refused.append(f"{folder}: {error.strerror or error}")
        else:
            return folder
    raise NativeBuildError(f"no cache folder ({'; '.join(refused)}); set SSM_KERNELS_CACHE")


def _cache_candidates() -> Iterator[tuple[Path, bool]]:
    """Folders in the order of preference, each with whether it is in the temporary folder of all users."""
    if chosen := os.environ.get("SSM_KERNELS_CACHE"):
        yield Path(chosen), False
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(base):  # "~" remains where there is no home
        yield Path(base) / "ssm_kernels", False
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # not one that can be written, as on a full disk
        return
    yield temporary / f"ssm_kernels-{os.getuid()}", True


def _check_private(folder: Path) -> None:
    # Anyone can make this folder first, or a link of its name, and would then choose the code that is loaded from it.
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"expected a folder of user {os.getuid()} that no other can write, found "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
        )


def _build(compiler: str, sources: Sequence[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        compilers = [
            subprocess.Popen(
                [compiler, *COMPILE_FLAGS, "-c", str(source), "-o", str(target)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for source, target in zip(sources, objects, strict=True)
        ]
        outputs = [process.communicate()[0] for process in compilers]
        for source, process, output in zip(sources, compilers, outputs, strict=True):
            if process.returncode != 0:
                raise NativeBuildError(f"{compiler} failed on {source.name}:\n{output[-4000:]}")
        linked = Path(folder) / library.name
        link = [compiler, "-shared", *map(str, objects), *_openmp_link_flags(), "-o", str(linked)]
        result = subprocess.run(link, capture_output=True, text=True)
        if result.returncode != 0:
            raise NativeBuildError(f"{compiler} failed to link {library.name}:\n{result.stderr[-4000:]}")
        os.replace(linked, library)


def _openmp_link_flags() -> list[str]:
    # torch's own OpenMP runtime, so that its threads and ours are one pool: two pools would spin against each other.
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not own:
        own = sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    return [str(own[0]), f"-Wl,-rpath,{own[0].parent}"] if own else ["-fopenmp"]


def _build_key(compiler: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    parts = [compiler, _compiler_version(compiler), *COMPILE_FLAGS, *_openmp_link_flags(), _cpu_features()]
    for part in parts:
        digest.update(part.encode() + b"\0")
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def _compiler_version(compiler: str) -> str:
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if result.returncode != 0:
        raise NativeBuildError(f"{compiler} --version failed: {result.stderr.strip()}")
    return result.stdout.partition("\n")[0]


@cache
def _cpu_features() -> str:
    # -march=native: a cache shared by machines (a home directory on a network) must tell them apart.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
