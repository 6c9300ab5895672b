"""The HTTP server: a pruning ratio per request on vLLM's own API server.

``vitcop-serve`` starts vLLM's server with this plugin. :mod:`vitcop_server.plugin` adds all
routes, handlers and middleware, so ``vllm serve`` with ``VLLM_PLUGINS=vitcop`` serves the same.
"""
