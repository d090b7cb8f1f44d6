"""The names of what a job leaves in its output directory that needs no torch to be read."""

from __future__ import annotations

JOB_FILE = "job.json"
METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
LOG_FILE = "job.log"
