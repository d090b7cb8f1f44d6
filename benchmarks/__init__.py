"""Measurements that anyone can rerun: ``python -m benchmarks.NAME``. Figures are ratios within one run."""
