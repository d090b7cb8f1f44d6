"""``python -m tasks worker -Q gpu``: ``celery -A tasks`` without imports from the working directory."""

import sys

from tasks.app import app

if __name__ == "__main__":
    app.start(sys.argv[1:])
