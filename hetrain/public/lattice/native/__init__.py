"""Masks by rejection, and the arithmetic modulo q that all kernels share, in C."""
