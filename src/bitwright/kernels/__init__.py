"""Linear layers over packed weights: y = x Wᵀ without ever holding W unpacked.

`problem` says what is asked (shape, scheme, dtypes, machine) and what every implementation gives back, `dispatch`
holds the table of implementations and chooses one when the weights are prepared, `reference` defines correctness.
`layouts` are the invertible orders in which codes lie in memory; none of them reaches disk. `cpu` uses PyTorch's own
integer operators, `dequantize` runs anywhere.
"""
