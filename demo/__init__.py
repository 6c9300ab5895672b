"""The small world of the demo model's images and questions, and the program that trains it."""
