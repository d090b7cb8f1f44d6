"""The client half of each engine: one module or package for each."""
