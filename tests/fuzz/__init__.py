"""Fuzzing of every parser of bytes that a stranger may write: ``python -m tests.fuzz --help``."""
