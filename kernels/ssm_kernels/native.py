"""Compiles native C++ for the CPU into a shared library, once a machine, and loads it with ctypes.

The sources see plain pointers and sizes, no torch headers, so a build takes seconds. The library is cached under a
key made of everything that decides its machine code; a file lock makes the first of several processes that start
together build it and the others wait. Environment: `CXX` names the compiler, `SSM_KERNELS_CACHE` the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
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
        NativeBuildError: there is no compiler, the compiler failed, or the library does not load.
    """
    compiler = find_compiler()
    key = _build_key(compiler, [*sources, *headers])
    folder = cache_folder()
    library = folder / f"{name}-{key}.so"
    if not library.exists():
        try:
            with FileLock(folder / f"{name}-{key}.lock", timeout=BUILD_TIMEOUT_SECONDS):
                if not library.exists():
                    _build(compiler, sources, library)
        except Timeout as error:
            raise NativeBuildError(
                f"another process has been building {library.name} for {BUILD_TIMEOUT_SECONDS:.0f} s; "
                f"if none is running, delete {folder}"
            ) from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeBuildError(f"{library} does not load: {error}") from error


def find_compiler() -> str:
    """Path of the C++ compiler: `$CXX`, else g++, else clang++. Raises NativeBuildError if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for candidate in candidates:
        path = shutil.which(candidate)
        if path:
            return path
    raise NativeBuildError(f"no C++ compiler found (looked for {', '.join(candidates)}); install g++ or set CXX")


def cache_folder() -> Path:
    """Folder of the built libraries, made if it is not there; a private temporary one where home is read-only."""
    chosen = os.environ.get("SSM_KERNELS_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    fallback = Path(tempfile.gettempdir()) / f"ssm_kernels-{os.getuid()}"
    for folder in [Path(chosen)] if chosen else [base / "ssm_kernels", fallback]:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise NativeBuildError(f"no writable cache folder; set SSM_KERNELS_CACHE (tried {chosen or base})")


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
        for source, process in zip(sources, compilers, strict=True):
            output, _ = process.communicate()
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
    return result.stdout.splitlines()[0]


@cache
def _cpu_features() -> str:
    # -march=native: a cache shared by machines (a home directory on a network) must tell them apart.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
