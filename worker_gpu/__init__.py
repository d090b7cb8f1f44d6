"""The evaluating half: public weights in int8, ciphertexts in, ciphertexts out. Holds no secret."""
