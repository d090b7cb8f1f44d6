"""Client half of `rlwe`: encryption, decryption, hints, and the kernels that compute them."""
