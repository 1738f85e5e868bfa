"""Checkpoints: reading no more of them than a rank needs, and writing them.

load.py                   a rank's parameters from slices of any source
safetensors_source.py, module_source.py, config_file.py, stored_names.py    sources, and what they hold under which name
fingerprint.py            whether two are the same model
chunks.py                 the layout table in the terms of distributed checkpoints
megatron_directory.py     a Megatron checkpoint: which iteration, in which format, and how to read it
torch_dist.py, torch_dist_writer.py, item_reader.py, saved_item.py          megatron-core's distributed format
legacy.py, legacy_writer.py, rank_files.py, torch_file.py, torch_archive.py the older one, a file a rank
megatron_tensors_on_disk.py, megatron_arguments.py, untrusted_pickle.py     what both hold beside tensors, and care
journal.py, background_writing.py, buffers.py, open_files.py, raw_values.py writing that can be gone on with, and fast
"""

from megatron_ssm.checkpoint.fingerprint import fingerprint
from megatron_ssm.checkpoint.load import TensorSource, load_parameters
from megatron_ssm.checkpoint.module_source import ModuleSource, NamedSource
from megatron_ssm.checkpoint.safetensors_source import SafetensorsSource, save_safetensors

__all__ = [
    "ModuleSource",
    "NamedSource",
    "SafetensorsSource",
    "TensorSource",
    "fingerprint",
    "load_parameters",
    "save_safetensors",
]
