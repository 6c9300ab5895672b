"""The demo model, and small random checkpoints for tests and benches."""
