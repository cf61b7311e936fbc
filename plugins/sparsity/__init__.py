"""Sparsity: structured N:M and sparse training."""
