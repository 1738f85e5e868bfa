"""SSM layers in Megatron-core's hybrid models. `megatron_ssm.specs` is the way in; this is what the specs build.

model.py              a family's model as a MambaModel, and its weights from a Hugging Face checkpoint
form.py               a family's model as Megatron lays it out: one part a layer, its letters, names and packing
stack.py              the layers of one pipeline stage
mixer.py              a mixer in Megatron's terms: [L, B, D], an inference context, packed sequences
block_layer.py        any other layer of a family, the same way
core_attention.py     the core of causal attention where TransformerEngine is not installed
norms.py              the norms between the layers, by what is installed
parameters.py         initial values, and what Megatron's training wants to know of each parameter
gradients.py          what is left to do with gradients before an optimizer's step; their norm
main_parameters.py    fp32 copies of bf16 parameters, for torch's optimizers
router.py             the router of megatron-core's expert layers where TransformerEngine is not installed
inference_state.py    the state of a layer within Megatron's static inference context
dynamic_state.py      the states of mixers within its dynamic one, where requests come and go
packed.py             packed sequences in Megatron's terms
sharded.py            what a distributed checkpoint is told of a module's parameters
distributed_checkpoint.py  saving and going on, at any number of ranks and stages
synchronous_save.py   megatron-core's format, written without a GPU
names.py              one set of names in state dicts, whatever is installed
without_gpu.py        megatron-core on a machine without a GPU
"""
