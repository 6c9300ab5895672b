"""The world that the demo model knows, and the program that trains it."""
