"""SSM layers in Megatron-core's hybrid models.

form.py      a family's model as Megatron lays it out: one part a layer, its letters, names and packing
"""
