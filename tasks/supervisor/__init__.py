"""Processes of one machine: workers, an embedded broker, and what starts them again."""
