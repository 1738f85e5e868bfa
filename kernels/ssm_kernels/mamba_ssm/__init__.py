"""The kernels of the packages mamba-ssm and causal-conv1d behind the ops, for inference: only where asked for.

They know no packed sequences, and Mamba-1's scan none but a zero state; a module's `refusal` says what it cannot take,
which then runs as without them. Their scans are channel-major, so that inputs and outputs are copied.
"""
