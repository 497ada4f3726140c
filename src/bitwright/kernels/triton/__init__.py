"""Portable GPU kernels in Triton: x Wᵀ, the same over stacks of experts, and the weight dense again.

Weights lie in fragment order (`kernels.fragments`). `fragment` turns words into tiles of a weight, on the device;
`gemm`, `experts` and `dequantize` are one kernel each with its launcher; `config` chooses tiles. They run on any GPU
that Triton serves, for every bit width, symmetric or not, groups of any multiple of 32 or whole rows, any M, N and K.

`int8` multiplies quantized activations on int8 tensor cores, with weights of 4 bits (`kernels.int8_fragments`) and 8;
`int8_config` chooses its tiles.
`quantize` turns activations into integer codes, `columns` and `norm` are what may come before that in the same launch.

Importing this package imports nothing; its modules import Triton.
"""
