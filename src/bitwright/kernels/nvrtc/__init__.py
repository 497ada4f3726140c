"""Kernels in CUDA C++, compiled when they are first needed by NVRTC, which torch's CUDA wheels bring along.

What Triton has no words for: sparse products of Hopper's tensor cores. Neither nvcc nor headers are needed.
"""
