"""Worker side: what a step computes per stage, and adapters to vLLM's model runners."""
