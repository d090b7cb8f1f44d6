"""The worker half of the engines: evaluates ciphertexts with public int8 weights. Holds no secret."""
