"""The client's kernels in C, and their loading."""
