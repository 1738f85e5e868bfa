"""Pickles of other people's checkpoints, read so that nothing in them runs.

Tensors and plain values come through torch's own restricted reader. Training runs put more into a checkpoint: their
arguments, with enumerations of Megatron's, and random states. Objects of the few packages that such things come from
are read as `StandIn`s, which hold what the pickle says of them and do nothing; any other class is refused.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

_STOOD_IN_FOR = ("megatron", "transformer_engine", "numpy", "signal", "_io", "types")
# What reading a damaged file may raise.
DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
)


_FROM_TORCH = {
    "torch.distributed.checkpoint.metadata": (metadata, frozenset((*metadata.__all__, "_MEM_FORMAT_ENCODING"))),
    "torch.distributed.checkpoint.filesystem": (filesystem, frozenset(("_StorageInfo", "_StoragePrefix"))),
    "torch.distributed.checkpoint.planner": (
        planner,
        frozenset(("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    ),
}
# megatron-core's own classes carry nothing that is read here.
_FROM_MEGATRON = {"MCoreMetadata": metadata.Metadata, "MCoreSavePlan": planner.SavePlan}


class StandIn:
    """In the place of an object whose class is not trusted.

    Attributes:
        class_name: of that object.
        arguments: that it was made of.
        state: that it was given.
    """

    class_name = ""
    arguments: tuple = ()
    state: object = None

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.class_name}{self.arguments}>"


def load_untrusted(path: Path, *, map_location: str = "cpu") -> object:
    """What torch.save has written.

    Args:
        path: of the file.
        map_location: "meta" reads no tensor's data; each storage tells where in the file they lie
            (`_checkpoint_offset`).

    Raises:
        ValueError: the file is damaged, is none of torch's, or names a class that is refused; names file and class.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except DAMAGED as error:
        raise ValueError(f"{path} is no file that torch.save has written, or is damaged: {error}") from error
    trusted = "argparse.Namespace"
    refused = sorted(name for name in names if name != trusted and name.split(".")[0] not in _STOOD_IN_FOR)
    if refused:
        raise ValueError(f"{path}: expected tensors and plain values, found {', '.join(refused)}, which is refused")
    allowed = [(_stand_in(name), name) for name in names if name != trusted]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"{path}: refused: {found[1] if found else error}") from error
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load_metadata(path: Path) -> metadata.Metadata:
    """The `.metadata` of a distributed checkpoint.

    Raises:
        ValueError: it is damaged, or names a class that does not belong there; names file and class.
    """
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except _Refused as error:
        raise ValueError(f"{path}: refused: {error}") from error
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"{path}: expected a Metadata of torch.distributed.checkpoint, found {type(found).__name__}")
    return found


def _stand_in(name: str) -> type:
    return type("StandIn", (StandIn,), {"class_name": name})


class _Refused(pickle.UnpicklingError):
    """The pickle names a class that it should not."""


class _MetadataUnpickler(pickle.Unpickler):
    """Admits what torch and megatron-core put into `.metadata`: descriptions of tensors, files and plans."""

    def find_class(self, module: str, name: str):
        owner, names = _FROM_TORCH.get(module, (None, ()))
        if name in names and hasattr(owner, name):
            return getattr(owner, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _strided
        if module.startswith("pathlib") and name == "PosixPath":
            return Path  # where it was written
        if (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in _FROM_MEGATRON:
            return _FROM_MEGATRON[name]
        raise _Refused(f"{module}.{name} does not belong into a checkpoint's metadata")


def _strided(name: str) -> torch.layout:
    if name != "torch.strided":
        raise _Refused(f"expected strided tensors, found layout {name}")
    return torch.strided
