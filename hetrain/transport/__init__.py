"""How a request reaches the workers and its result comes back. Sees ciphertexts only."""
