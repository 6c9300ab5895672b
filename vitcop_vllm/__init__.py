"""ViTCoP visual token pruning inside vLLM: the plugin and its method."""

__version__ = "0.2.0"
