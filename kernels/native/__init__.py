"""Kernels in C++ for CPUs: each op's `native.cpp`, compiled on the machine that runs them."""
