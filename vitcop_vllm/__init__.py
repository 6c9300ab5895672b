"""ViTCoP visual token pruning inside vLLM: a plugin, its method, its measurements."""

__version__ = "0.2.0"
