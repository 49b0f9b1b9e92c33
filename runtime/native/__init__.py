"""Kernels of our own, in C++; see `kernels`."""
