"""Norms and gates of a decoder's blocks, in C."""
