"""Verifying results before they are decrypted. Nothing here holds an encryption secret."""
