"""The worker's side of the queue: ``celery -A tasks worker -Q gpu``."""

from tasks.app import app

__all__ = ["app"]
