"""Answers at each ratio: a table for people, one JSON document as the last line."""
