"""The client's model: what it loads, which linears leave for the workers, and how they come back."""
