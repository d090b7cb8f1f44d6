"""The public base model: where its files are, and how its weights are quantized."""
