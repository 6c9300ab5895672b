"""Worker side: what a step computes per segment, and adapters to vLLM's model runners."""
