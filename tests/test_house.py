"""The rules of the house, as tests: which package may import which, what they are called, what the README promises."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "ssm_kernels": ROOT / "kernels" / "ssm_kernels",
    "megatron_ssm": ROOT / "megatron_ssm",
    "deepspeed_inference": ROOT / "deepspeed_inference",
}
NEVER = {
    "ssm_kernels": {"megatron_ssm", "deepspeed_inference", "megatron", "deepspeed", "transformers", "tools"},
    "megatron_ssm": {"deepspeed_inference", "deepspeed", "tools"},
    "deepspeed_inference": {"tools"},
}
FILES = [(package, file) for package, folder in FOLDERS.items() for file in sorted(folder.rglob("*.py"))]
README = (ROOT / "README.md").read_text()


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(("package", "file"), FILES, ids=[str(file.relative_to(ROOT)) for _, file in FILES])
def test_arrows_point_one_way_and_every_file_says_what_it_is(package, file):
    tree = ast.parse(file.read_text())
    assert not _imports(tree) & NEVER[package]
    assert ast.get_docstring(tree), "a module begins with what it is"
    assert file.stem not in {"utils", "util", "helpers", "common", "misc", "manager"}


def test_only_the_collectives_call_collectives():
    calls = re.compile(
        r"\bdist\.(all_|reduce|broadcast|gather|barrier|send|recv)|torch\.distributed\.(all_|reduce|broad)"
    )
    for package, file in FILES:
        if "collectives" not in file.parts:
            assert not calls.search(file.read_text()), f"{package}: {file.name} calls a collective"


def test_nothing_is_importable_as_kernels():
    assert importlib.util.find_spec("kernels") is None or importlib.util.find_spec("kernels").origin is None
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("package", FOLDERS)
def test_every_public_name_can_be_imported_and_says_what_it_is(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"
    assert set(module.__all__) <= set(dir(module))


def test_help_comes_without_loading_the_stack():
    code = "import sys; sys.argv = ['infer.py', '--help']\ntry:\n import infer; infer.main()\nexcept SystemExit: pass\n"
    code += "assert not {'deepspeed', 'transformers', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_every_make_target_of_the_readme_is_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert {"infer", "test", "bench", "demo"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names make {target}"


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|yaml|md|txt|cpp))`", README):
        found = [ROOT / name, *(folder / name for folder in FOLDERS.values()), ROOT / "kernels" / name]
        rooms = [*(ROOT / "deepspeed_inference").rglob(name)]  # named beside the room that they are in
        assert any(path.exists() for path in (*found, *rooms)), f"README names {name}"


def test_every_option_of_the_readmes_commands_is_known():
    from deepspeed_inference.config import command_line_parser

    known = command_line_parser().format_help()
    for line in README.splitlines():
        if "infer.py" in line:
            for flag in re.findall(r"--[a-z][\w-]*", line.partition("infer.py")[2]):
                assert flag in known, f"README uses {flag}"


def test_every_option_of_the_readmes_conversions_is_known():
    help_text = (ROOT / "megatron_ssm" / "conversion" / "command_line.py").read_text()
    commands = re.findall(r"tools/convert_checkpoint\.py((?:[^\n]*\\\n)*[^\n#]*)", README)
    assert len(commands) > 2
    for command in commands:
        for flag in re.findall(r"--[a-z][\w-]*", command):
            assert f'"{flag}"' in help_text, f"README uses {flag}"


def test_the_readmes_python_runs(tmp_path):
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if re.search("init_inference|stack_spec", block)
    ]
    assert len(blocks) > 2
    # One after the other in one process, each with names of its own.
    code = f"for block in {blocks!r}: exec(block, {{}})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)


def test_the_readmes_family_and_its_table_of_collectives_are_those_of_the_code():
    from deepspeed_inference.communication_table import family_configs, markdown, rows
    from megatron_ssm.families import families

    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "FAMILY" in block)
    scope: dict = {}
    exec(example, scope)
    sizes = {"mamba_heads": 8, "mamba_head_dim": 4, "mamba_groups": 2, "state_size": 4, "conv_kernel": 4}
    sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 9}
    config = SimpleNamespace(**sizes, rms_norm_eps=1e-5, tie_word_embeddings=True)
    table = scope["FAMILY"].parameters(config)
    assert {"model.layers.0.mamba.in_proj.weight", "model.layers.0.feed_forward.gate_proj.weight"} <= set(table)
    assert markdown(rows(family_configs(), (2, 4, 8)), (2, 4, 8)) in README
    for name in families():
        assert f"`{name}`" in README


def test_every_package_is_in_the_wheel():
    listed = set(re.findall(r'^        "([\w.]+)",$', (ROOT / "setup.py").read_text(), re.MULTILINE))
    for package, folder in FOLDERS.items():
        for file in folder.rglob("__init__.py"):
            assert ".".join([package, *file.parent.relative_to(folder).parts]) in listed


def test_licence_and_changelog_are_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "0.1.0" in (ROOT / "CHANGELOG.md").read_text()
