"""Attention: cheaper patterns, fewer key-value heads."""
