"""The ViTCoP method (arXiv 2601.17818) and other selectors, free of vLLM.

``settings``, ``budgets`` and ``plan`` are plain Python; ``saliency``, ``clustering``,
``selection`` and ``selectors`` are torch functions without host synchronisation or
data-dependent shapes.
"""
