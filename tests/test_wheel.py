"""A built wheel, unpacked elsewhere, does the main job by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_unpacked_elsewhere_generates(tmp_path):
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "out", "tests", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=unwanted)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("megatron_ssm-*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import sys, deepspeed_inference.command_line.cli as cli; print(cli.__file__); sys.exit(cli.main())"
    run = subprocess.run(
        [sys.executable, "-c", code, "--json", "--config", "creative", "--max-new-tokens", "4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    where, answer, _ = run.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert json.loads(answer)["tokens"] == 4
