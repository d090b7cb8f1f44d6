"""What comes after training, in clear on the client: merging, GGUF, questions, and the report of a run."""
