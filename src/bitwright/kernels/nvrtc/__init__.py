"""Kernels in CUDA C++, compiled when they are first needed by NVRTC, which torch's CUDA wheels bring along.

Sparse products of Hopper's tensor cores, for which Triton has no words, and packed weights times few tokens
(`few_tokens`) or numbers of tokens between powers of two (`many_tokens`), which Gluon does more slowly. Neither nvcc
nor headers are needed.
"""
