"""Pruned variants of vLLM's models: each file holds only what differs."""
