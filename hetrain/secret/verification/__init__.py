"""Verifying results with public matrices before they are decrypted. Nothing here holds an encryption secret."""
