"""What keeps the client's memory small: stored types, saved activations, recomputation."""
