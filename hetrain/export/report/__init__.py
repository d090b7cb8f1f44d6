"""The report of a run: one HTML page from its records."""
