"""Tensors in, tensors out; no processes."""
