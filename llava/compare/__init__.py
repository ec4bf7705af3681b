"""Compare vision towers: the same recipe for each, and a table with costs and intervals at the end."""
