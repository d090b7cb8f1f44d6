"""A job's requests: their state, how they are sent, collected, sent again after a fault, and cleaned up."""
