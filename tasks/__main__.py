"""``python -m tasks worker -Q gpu``: as ``celery -A tasks``, but never imports from the working directory."""

import sys

from tasks.app import app

if __name__ == "__main__":
    app.start(sys.argv[1:])
