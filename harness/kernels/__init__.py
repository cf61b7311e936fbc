"""Kernels for quantized layers: Triton on CUDA, plain torch everywhere else.

`weight_only` multiplies full-precision activations with packed 2-, 3-, 4- and 8-bit weights, `table` with
places in a table, `int8` multiplies int8 with int8, `gptq` rounds weights column by column. Each chooses a
kernel from shapes and types alone (never from data, so a CUDA graph can be captured) and says which;
`reference` holds the plain-torch form that every kernel is tested against. The Triton modules are imported
only where there is a CUDA device.
"""
