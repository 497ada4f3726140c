"""Linear layers over packed weights: y = x Wᵀ without ever holding W unpacked.

`problem` says what is asked (shape, scheme, dtypes, machine) and what every implementation gives back, `dispatch`
holds the table of implementations and chooses one when the weights are prepared, `reference` defines correctness.

On a CPU: `layouts` are the invertible orders in which codes lie in memory, `cpu` uses PyTorch's own integer operators,
`dequantize` runs anywhere. On an NVIDIA GPU: `fragments` is the one order in memory, `ops` the operators that torch
knows, `cuda` the implementations over them; `triton/` has the kernels for every GPU, `gluon/` and, in CUDA C++,
`nvrtc/` those for Hopper, of which `hopper` takes the fastest for a number of tokens; `workspace` is the memory that
programs of a kernel share, `routing_ops` the order in which experts take tokens; `attention`, `elementwise` and
`routing` are what lies between the linears of a decoding model, `dependent` lets their launches overlap. For split
inputs, `split` has the implementations on a CPU, `split_ops` the operators that quantize activations, and
`shared_input` lets linears that read one tensor call them once; on a GPU `int8_fragments`, `int8_ops` and `split_cuda`
are order, operators and implementation, `sparse_fragments`, `sparse_ops` and `sparse_mma` the same for 2:4 on Hopper,
`split_sparse` 2:4 elsewhere. `permuted` adds an order of columns to any of them. No order of memory reaches disk.
"""
