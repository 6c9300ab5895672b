"""The ViTCoP method (arXiv 2601.17818) and other selectors, free of vLLM.

``settings``, ``budgets``, ``selector`` and ``plan`` are plain Python: they know how many tokens
survive. ``saliency``, ``clustering``, ``selection`` and the functions of ``selectors`` are torch
code that selects them, without host synchronisation or data-dependent shapes.
"""
