"""Worked examples; each reproduces something the project ships."""
