"""The public part of the encryption `rlwe`: parameter sets and masks."""
