"""Tiny random checkpoints of model families that no bench uses."""
