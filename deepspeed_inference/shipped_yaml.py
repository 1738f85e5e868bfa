"""YAML files that the distribution ships, found by name or by path: presets, and what benchmarks measure."""

from __future__ import annotations

from pathlib import Path

import yaml


def read_yaml(what: str, name: str | Path, folder: Path) -> tuple[Path, object]:
    """The file, and what is in it.

    Args:
        what: the file is, for the errors.
        name: a path, or the name of a file of `folder`.
        folder: of those that are shipped.

    Raises:
        ValueError: there is no such file, or it is not YAML.
    """
    shipped = folder / f"{name}.yaml"
    path = shipped if not Path(name).is_file() and shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"{what} {name}: no such file, and not one of those shipped ({names})")
    try:
        return path, yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path}: not YAML: {error}") from error
