"""Speed, memory, and whether all is right under load: a table, then one JSON document."""
