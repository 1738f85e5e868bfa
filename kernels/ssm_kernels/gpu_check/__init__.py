"""Checks of the kernels on a GPU: are they right, and how far are they from what the card could do at most.

`machine` measures the card, `cases` are the kernels at the sizes of real models, `exactness` compares them with the
reference, `resources` says what the compiler made of them, and `report` writes it all down. `tools/gpu_check.py` runs
them, `tools/kernel_resources.py` only `resources`, which needs no GPU.
"""
