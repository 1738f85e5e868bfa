"""Where a rank's file of the older Megatron format lies: below mp_rank_TT, or mp_rank_TT_PPP of several stages."""

from __future__ import annotations

import re
from pathlib import Path

FILE = "model_optim_rng.pt"
_FILES = (FILE, "model_rng.pt")  # the latter where the optimizer's state lies in files of its own
_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")


def rank_folder(rank: int, stage: int, stages: int) -> str:
    """The name of a rank's directory."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def rank_files(iteration: Path) -> list[list[Path]]:
    """The files of all ranks, by stage and then by tensor-parallel rank.

    Raises:
        ValueError: one is missing, or the directories are those of another kind of checkpoint; names it.
    """
    found: dict[tuple[int, int], Path] = {}
    for folder in sorted(iteration.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            raise ValueError(
                f"{folder}: expected mp_rank_TT or mp_rank_TT_PPP (no expert parallelism), found this name"
            )
        found[int(match[2] or 0), int(match[1])] = folder
    stages, ranks = (1 + max(place[axis] for place in found) for axis in (0, 1))
    files = []
    for stage in range(stages):
        files.append([])
        for rank in range(ranks):
            folder = found.get((stage, rank))
            if folder is None:
                name = rank_folder(rank, stage, stages)
                raise ValueError(
                    f"{iteration}: expected {ranks} tensor-parallel ranks in {stages} stages, found no directory {name}"
                )
            files[-1].append(_file(folder))
    return files


def _file(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: expected a file {' or '.join(_FILES)}, found none")
