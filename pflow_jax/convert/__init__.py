"""Weights to and from PyTorch: one table of names a model, read both ways."""
