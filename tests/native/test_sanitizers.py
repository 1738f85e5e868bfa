"""The C++ of the kernels by itself, under the address and undefined-behaviour sanitizers.

The drivers of this folder call every entry point at sizes around the vector widths, with memory that ends where the
tensor ends, and compare the results with naive loops. Here they are compiled for an instruction set each and run. A
read behind a tensor that happens to find mapped memory passes every other test.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ssm_kernels.cpu.library import ENTRY_POINTS, FOLDER, SOURCES

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
# With line numbers, but without the rest of what a debugger asks for, which doubles the time of a build.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fopenmp",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-Wno-psabi",
]
# Leaks are looked for by stopping the process, which many containers forbid.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
COMPILE_SECONDS, RUN_SECONDS = 300, 120
X86 = platform.machine() in {"x86_64", "AMD64"}


def _cpu_has(*features: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and set(features) <= set(re.findall(r"\w+", cpuinfo.read_text()))


INSTRUCTION_SETS = [
    pytest.param(["-march=native"], id="native"),
    pytest.param(
        ["-mavx2", "-mfma", "-mf16c"],
        id="avx2",
        marks=[pytest.mark.full, pytest.mark.skipif(not _cpu_has("avx2", "fma", "f16c"), reason="no AVX2 here")],
    ),
    pytest.param(
        [],
        id="plain",
        marks=[pytest.mark.full, pytest.mark.skipif(not X86, reason="what plain means is tested on x86")],
    ),
]


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory) -> None:
    """Skips where no program can be built and run with the sanitizers."""
    if COMPILER is None:
        pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("sanitizers")
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n")
    built = _run(COMPILER, *FLAGS, source, "-o", program, seconds=COMPILE_SECONDS)
    if built.returncode != 0:
        pytest.skip(f"g++ has no sanitizer runtimes here: {built.stdout.strip()[-200:]}")
    started = _run(program, seconds=RUN_SECONDS)
    if started.returncode != 0:
        pytest.skip(f"a program with sanitizers does not start here: {started.stdout.strip()[-200:]}")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_entry_point_under_the_sanitizers(sanitizers, tmp_path, instruction_set):
    program = _build(instruction_set, FOLDER, tmp_path)
    result = _run(program, seconds=RUN_SECONDS)
    assert result.returncode == 0, result.stdout[-6000:]
    driven = re.findall(r"^drove (\w+)$", result.stdout, re.MULTILINE)
    exported = {
        name
        for file in SOURCES
        for name in re.findall(r'^extern "C" \w+ (\w+)\(', (FOLDER / file).read_text(), re.MULTILINE)
    }
    missing = (set(ENTRY_POINTS) | exported) - set(driven)
    assert not missing, f"no driver in tests/native calls {', '.join(sorted(missing))}"


def _build(instruction_set: list[str], kernels: Path, folder: Path) -> Path:
    """The program of all drivers with the kernels of one folder, the files compiled side by side."""
    drivers = sorted(HERE.glob("*.cpp"))
    included = {
        name for file in drivers for name in re.findall(r'^#include "(\w+\.cpp)"', file.read_text(), re.MULTILINE)
    }
    sources = drivers + [kernels / name for name in SOURCES if name not in included]
    # The longest first, so that none is left over when the others are done.
    sources.sort(key=lambda file: file.stat().st_size, reverse=True)
    objects = [folder / f"{file.stem}.o" for file in sources]

    def compile_one(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
        includes = [f"-I{kernels}", f"-I{HERE}"]
        return _run(COMPILER, *FLAGS, *instruction_set, *includes, "-c", source, "-o", target, seconds=COMPILE_SECONDS)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, result in zip(sources, pool.map(compile_one, sources, objects), strict=True):
            assert result.returncode == 0, f"{source.name}:\n{result.stdout[-4000:]}"
    program = folder / "drivers"
    linked = _run(COMPILER, *FLAGS, *objects, "-o", program, seconds=COMPILE_SECONDS)
    assert linked.returncode == 0, linked.stdout[-4000:]
    return program


def _run(*command: str | Path, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        env=os.environ | ENVIRONMENT,
    )
