"""What a worker takes from its broker: checked before Celery parses it, and dropped unless it is ours."""
