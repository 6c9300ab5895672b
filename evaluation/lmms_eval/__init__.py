"""The demo exam as a task of lmms-eval; docs/accuracy.md has the commands."""
