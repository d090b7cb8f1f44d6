"""Reading what the client needs of a base model's files."""
