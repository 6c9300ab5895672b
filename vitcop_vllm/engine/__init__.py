"""Staged KV cache inside vLLM's core: spec, manager, attention backend, scheduler."""
