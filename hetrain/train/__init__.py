"""Rows, micro-batches, one step, the asynchronous loop, and what a run leaves behind."""
