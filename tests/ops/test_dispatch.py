"""Which backend runs, what it says about it, and how the native library is built."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssm_kernels
from ssm_kernels import backend_report, rms_norm, use_backend

KERNELS = Path(ssm_kernels.__file__).parent.parent
NORMS = """
import warnings, torch, ssm_kernels
ssm_kernels.backend_report()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.arange(8.0)
    for _ in range(3):
        out = ssm_kernels.rms_norm(x)
    expected = x * torch.rsqrt(x.square().mean() + 1e-5)
    assert torch.allclose(out, expected), out
    step = ssm_kernels.causal_conv1d(x[None, :, None], torch.ones(1, 2))
    assert step.flatten().tolist() == [0, 1, 3, 5, 7, 9, 11, 13], step
print(sum("ssm_kernels" in str(one.message) for one in caught))
for one in caught:
    print(one.message)
print(ssm_kernels.backend_report())
"""


def python(script, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


def test_native_by_default_and_reference_for_other_dtypes(recwarn):
    rms_norm(torch.ones(4))
    assert backend_report()["native"] == "available"
    assert backend_report()["rms_norm"].startswith("native")
    for dtype in (torch.float64, torch.float16):
        assert rms_norm(torch.ones(4, dtype=dtype)).dtype == dtype
        assert backend_report()["rms_norm"].startswith(f"reference (a tensor is {dtype}")
    assert not [one for one in recwarn if "ssm_kernels" in str(one.message)]


def test_override_and_its_end():
    with use_backend("reference"):
        rms_norm(torch.ones(4))
        assert backend_report()["rms_norm"] == "reference (forced)"
        assert backend_report()["forced"] == "reference"
    rms_norm(torch.ones(4))
    assert backend_report()["rms_norm"].startswith("native")


def test_forced_native_that_cannot_run():
    with use_backend("native"), pytest.raises(ValueError, match=r"rms_norm: expected .* 'native'.*torch.float64"):
        rms_norm(torch.ones(4, dtype=torch.float64))


def test_unknown_backend():
    with pytest.raises(ValueError, match="expected one of auto, native, reference, found 'cuda'"), use_backend("cuda"):
        pass


def test_environment_override():
    script = "import torch, ssm_kernels; ssm_kernels.rms_norm(torch.ones(3)); print(ssm_kernels.backend_report())"
    assert "'rms_norm': 'reference (forced)'" in finish(python(script, SSM_KERNELS_BACKEND="reference"))
    process = python(script, SSM_KERNELS_BACKEND="fast")
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "SSM_KERNELS_BACKEND: expected one of auto, native, reference, found 'fast'" in error


def test_without_a_compiler_one_warning_says_why(tmp_path):
    cache = str(tmp_path / "cache")
    process = python(NORMS, CXX="/nonexistent", SSM_KERNELS_CACHE=cache)
    forced = python(NORMS, CXX="/nonexistent", SSM_KERNELS_CACHE=cache, SSM_KERNELS_BACKEND="native")
    count, warning, report = finish(process).splitlines()
    assert count == "1"
    assert "no C++ compiler found (looked for /nonexistent)" in warning and "(slow) reference" in warning
    assert "unavailable: no C++ compiler found" in report
    _, error = forced.communicate(timeout=120)
    assert forced.returncode != 0
    assert (
        "ValueError: rms_norm: expected to run on the forced backend 'native'" in error and "no C++ compiler" in error
    )


def test_a_failing_compiler_is_quoted(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "disk of sand" >&2; exit 1\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    out = finish(python(NORMS, CXX=str(compiler), SSM_KERNELS_CACHE=str(tmp_path / "cache")))
    assert out.startswith("1\n") and "disk of sand" in out


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_processes_that_start_together_build_once(tmp_path):
    log = tmp_path / "compilations"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo "$*" >> {log};; esac\nexec g++ "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    environment = {"CXX": str(compiler), "SSM_KERNELS_CACHE": str(tmp_path / "cache")}
    processes = [python(NORMS, **environment) for _ in range(4)]
    for process in processes:
        assert "'native': 'available'" in finish(process)
    sources = sorted(path.name for path in (KERNELS / "ssm_kernels" / "csrc").glob("*.cpp"))
    compiled = sorted(
        next(Path(word).name for word in line.split() if word.endswith(".cpp")) for line in log.read_text().splitlines()
    )
    assert compiled == sources
