"""Linear layers over packed weights: y = x Wᵀ without ever holding W unpacked.

`problem` says what is asked (shape, scheme, dtypes, machine) and what every implementation gives back, `dispatch`
holds the table of implementations and chooses one when the weights are prepared, `reference` defines correctness.

On a CPU: `layouts` are the invertible orders in which codes lie in memory, `cpu` uses PyTorch's own integer operators,
`dequantize` runs anywhere. On an NVIDIA GPU: `fragments` is the one order in memory, `ops` the operators that torch
knows, `cuda` the implementations over them; `gluon/` is the kernel for Hopper, `triton/` the ones for every GPU,
`workspace` the memory that programs of a kernel share, `routing_ops` the order in which experts take tokens. For split
inputs, `split` has the implementations, `split_ops` the operators that quantize activations, and `shared_input` lets
linears that read one tensor call them once. `permuted` adds an order of columns to any of them. No order of `layouts`
or `fragments` reaches disk.
"""
