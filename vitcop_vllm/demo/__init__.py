"""Checkpoints that the project makes itself, for tests, benches and a first look."""
