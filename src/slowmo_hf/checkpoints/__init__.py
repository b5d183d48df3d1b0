"""Checkpoints: files that are whole or absent, and what is in them."""
