"""Distillation: a smaller student taught by the model."""
