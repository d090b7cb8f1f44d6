"""The public int8 matrices that a worker holds, and the part of a model that it serves."""
