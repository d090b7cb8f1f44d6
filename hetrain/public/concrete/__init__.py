"""The public part of the engine `concrete`: the circuits, and how their ciphertexts are framed."""
