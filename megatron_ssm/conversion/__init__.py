"""Conversion of checkpoints between Hugging Face and Megatron, and between numbers of ranks: one process, no GPU.

convert.py          the loop over the tensors, and what is checked before it
from_*.py, to_*.py  the four ends
plugin_*.py         the same ends as loaders and savers of Megatron-LM's own converter
inspection.py       what a checkpoint is, and whether it is whole
"""
