"""What client and workers say to each other: messages, plans, registrations, and the names of Redis keys."""
