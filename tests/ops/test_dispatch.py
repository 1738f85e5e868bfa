"""Which backend runs, what it says about it, and how the native library is built."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import ssm_kernels
from ssm_kernels import backend_report, dispatch, native, rms_norm, use_backend
from ssm_kernels.codecs import CODECS

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
    known = "auto, native, triton, mamba_ssm, reference"
    with pytest.raises(ValueError, match=f"expected one of {known}, found 'cuda'"), use_backend("cuda"):
        pass


def test_environment_override():
    script = "import torch, ssm_kernels; ssm_kernels.rms_norm(torch.ones(3)); print(ssm_kernels.backend_report())"
    assert "'rms_norm': 'reference (forced)'" in finish(python(script, SSM_KERNELS_BACKEND="reference"))
    process = python(script, SSM_KERNELS_BACKEND="fast")
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "SSM_KERNELS_BACKEND: expected one of auto, native, triton, mamba_ssm, reference, found 'fast'" in error


def test_without_a_compiler_one_warning_says_why(tmp_path):
    cache = str(tmp_path / "cache")
    process = python(NORMS, CXX="/nonexistent", SSM_KERNELS_CACHE=cache)
    forced = python(NORMS, CXX="/nonexistent", SSM_KERNELS_CACHE=cache, SSM_KERNELS_BACKEND="native")
    count, warning, report = finish(process).splitlines()
    assert count == "1"
    assert "no C++ compiler found (looked for /nonexistent)" in warning and "slow PyTorch reference" in warning
    assert "unavailable: no C++ compiler found" in report
    _, error = forced.communicate(timeout=120)
    assert forced.returncode != 0
    assert (
        "ValueError: rms_norm: expected to run on the forced backend 'native'" in error and "no C++ compiler" in error
    )


def test_the_warning_points_at_the_call_of_the_op(monkeypatch):
    monkeypatch.setattr(dispatch, "_native_problem", lambda: "no compiler")
    x, pool = torch.ones(1, 4, 4), torch.ones(1, 4, 1)
    heads = x[..., None]
    codec = CODECS["int8"]
    wire = torch.zeros(codec.nbytes(4), dtype=torch.uint8)
    calls = {
        "rms_norm": lambda: rms_norm(x),
        "causal_conv1d": lambda: ssm_kernels.causal_conv1d(x, torch.ones(4, 2)),
        "causal_conv1d_update": lambda: ssm_kernels.causal_conv1d_update(x[:, 0], pool, torch.ones(4, 2)),
        "selective_scan": lambda: ssm_kernels.selective_scan(x, x, torch.ones(4, 1), x[..., :1], x[..., :1]),
        "selective_state_update": lambda: ssm_kernels.selective_state_update(
            pool, x[:, 0], x[:, 0], torch.ones(4, 1), x[:, 0, :1], x[:, 0, :1]
        ),
        "ssd_scan": lambda: ssm_kernels.ssd_scan(heads, x, torch.ones(4), heads, heads),
        "ssd_state_update": lambda: ssm_kernels.ssd_state_update(
            pool[..., None], heads[:, 0], x[:, 0], torch.ones(4), heads[:, 0], heads[:, 0]
        ),
        "gated_rms_norm": lambda: ssm_kernels.gated_rms_norm(x, x),
        "gated_product": lambda: ssm_kernels.gated_product(x, x),
        "scale_rows": lambda: ssm_kernels.scale_rows(x, x[..., 0]),
        "quantize": lambda: ssm_kernels.quantize(x[0, 0], codec),
        "dequantize_sum": lambda: ssm_kernels.dequantize_sum([wire], codec, 4, torch.float32),
        "quantize_sum": lambda: ssm_kernels.quantize_sum([wire], codec, 4),
    }
    for op, call in calls.items():
        monkeypatch.setattr(dispatch, "_warned", False)
        with pytest.warns(RuntimeWarning, match="slow PyTorch reference .*: no compiler") as caught:
            call()
        assert [one.filename for one in caught] == [__file__], op
        call()


def fake_compiler(folder, commands):
    """A compiler that knows its version and does `commands` when asked for anything else."""
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\n{commands}\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return str(compiler)


def test_a_failing_compiler_is_quoted(tmp_path):
    compiler = fake_compiler(tmp_path, 'echo "disk of sand" >&2; exit 1')
    out = finish(python(NORMS, CXX=compiler, SSM_KERNELS_CACHE=str(tmp_path / "cache")))
    assert out.startswith("1\n") and "disk of sand" in out


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ("os.replace", "No space left on device"),
        ("fcntl.flock", "No locks available"),
        ("tempfile.mkdtemp", "Read-only file system"),
    ],
)
def test_what_the_file_system_refuses_is_the_reason_for_the_reference(refused, reason, tmp_path):
    refuse = f"""
import errno, fcntl, os, tempfile
def refuse(*_, **__):
    raise OSError({{os.strerror(code): code for code in errno.errorcode}}[{reason!r}], {reason!r})
{refused} = refuse
"""
    # Taken away after the imports, which may use it.
    script = f"import torch, ssm_kernels\n{refuse}{NORMS}"
    compiler = fake_compiler(tmp_path, "exit 0")
    count, warning, report = finish(
        python(script, CXX=compiler, SSM_KERNELS_CACHE=str(tmp_path / "cache"))
    ).splitlines()
    assert count == "1"
    assert f"ssm_kernels cannot be built with {compiler} in {tmp_path / 'cache'}: " in warning and reason in warning
    assert "unavailable: ssm_kernels cannot be built" in report


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No home directory and no cache folder set; the temporary folder is the test's own."""

    def unknown(_):
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "SSM_KERNELS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="home directory"):
        Path.home()
    return tmp_path / f"ssm_kernels-{os.getuid()}"


def test_cache_folder_without_a_home(homeless, monkeypatch, tmp_path):
    assert native.cache_folder() == homeless
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700
    assert native.cache_folder() == homeless, "made before"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == tmp_path / "xdg" / "ssm_kernels"
    monkeypatch.setenv("SSM_KERNELS_CACHE", str(tmp_path / "chosen"))
    assert native.cache_folder() == tmp_path / "chosen"


def test_cache_folder_where_home_cannot_hold_one(homeless, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.write_text("a file")
    monkeypatch.setenv("HOME", str(home))
    assert native.cache_folder() == homeless
    home.unlink()
    assert native.cache_folder() == home / ".cache" / "ssm_kernels"
    monkeypatch.setenv("SSM_KERNELS_CACHE", __file__)
    with pytest.raises(
        native.NativeBuildError, match=r"no cache folder \(.*test_dispatch.py: File exists\); set SSM_K"
    ):
        native.cache_folder()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_temporary_cache_that_others_can_write_is_refused(mode, homeless):
    homeless.mkdir()
    homeless.chmod(mode)
    with pytest.raises(native.NativeBuildError, match=r"expected a folder of user .* that no other can write, found d"):
        native.cache_folder()
    homeless.chmod(0o755)
    assert native.cache_folder() == homeless


def test_a_temporary_cache_of_another_user_or_behind_a_link_is_refused(homeless, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    homeless.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(native.NativeBuildError, match="found lrwx"):
        native.cache_folder()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (tmp_path / f"ssm_kernels-{owner + 1}").mkdir(mode=0o700)
    with pytest.raises(native.NativeBuildError, match=f"found drwx------ of user {owner}"):
        native.cache_folder()


def test_only_gcc_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\n")
    clang.chmod(0o755)
    with pytest.raises(native.NativeBuildError, match=r"looked for g\+\+"):
        native.find_compiler()
    monkeypatch.setenv("CXX", "clang++")
    assert native.find_compiler() == str(clang)


@pytest.mark.full
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
