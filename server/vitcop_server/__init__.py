"""The HTTP side: a pruning ratio per request on vLLM's own API server.

``vitcop-serve`` starts vLLM's server with our plugin on; everything a request needs is in
:mod:`vitcop_server.plugin`, so that ``vllm serve`` with ``VLLM_PLUGINS=vitcop`` serves the same.
"""
