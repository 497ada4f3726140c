"""Speed and memory, measured: kernels, decoding, prefill and bytes, beside 16-bit weights and the machine's limits.

Shapes are those of published models, weights are random: speed does not depend on their values, and a 175B model need
not be there to time one of its layers. Every measurement is a record (`records`), one JSON line that says when, on
which machine and by which command; tables are made from records alone.

`shapes` what is measured; `timing` how; `peers` against what. `kernels`, `experts`, `memory`, `decode`, `prefill` and
`throughput` are the benchmarks; the last three run `model`, a decoder of real shapes in which only the linears differ
between 16-bit and quantized (`linears`, `mlp`, between them `attention`, `elementwise` and `routing` of `kernels`). It
is made to fit by `fitting` and compared with itself by `correctness` before it is timed.

A benchmark is run(options) -> records and table(records) -> what people see. Nothing here is imported by the rest.
"""
