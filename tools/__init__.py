"""Programs for developers; not in the wheels."""
