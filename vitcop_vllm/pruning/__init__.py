"""The ViTCoP method (arXiv 2601.17818), free of vLLM.

``settings`` and ``plan`` are plain Python; ``saliency``, ``clustering`` and ``selection``
are torch functions without host synchronisation or data-dependent shapes.
"""
