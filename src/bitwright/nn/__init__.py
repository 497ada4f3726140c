"""Modules that hold packed weights, and the loader that puts them into a transformers model.

`linear` and `embedding` wrap one packed weight each, `experts` runs the experts of a layer that tokens were sent to,
`load` turns a quantized folder into a model. transformers is loaded only by `load`.
"""
