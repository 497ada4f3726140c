"""From a model on disk to one decoder block at a time in memory.

`source` finds the folder, `checkpoint` reads and writes safetensors shards, `naming` follows transformers' own
renaming of tensors, `discover` finds blocks and linears, `experts` splits fused expert stacks, `load` ties them
together. Nothing is imported here: transformers is loaded only by the call that needs it.
"""
