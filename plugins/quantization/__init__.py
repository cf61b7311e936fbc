"""Quantization: fewer bits per weight and activation."""
