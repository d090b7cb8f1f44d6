"""Client only: keys, noise, quantised activations. Nothing that runs on a worker may import this package."""
