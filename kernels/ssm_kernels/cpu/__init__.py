"""Launchers of the native CPU kernels in csrc/: they describe tensors to C++ and hold no logic of their own."""
