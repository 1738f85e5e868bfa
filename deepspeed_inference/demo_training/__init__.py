"""How the demo model is trained: a byte-level Mamba on the source of Python's standard library, at any number of ranks.

corpus.py      which files are learned from, which are held out, and the windows that a step reads
recipe.py      what decides the result: the model and how fast it learns
shards.py      whole tensors from the ranks' pieces, and back, by the layout table
optimizer.py   AdamW over one rank's pieces
trainer.py     the loop: state carried from window to window, saved and resumed
export.py      the Hugging Face checkpoint
finish.py      the end: the model is written, scored and described
card.py        the model card, from the record
plots.py       the curves, from the record
"""
