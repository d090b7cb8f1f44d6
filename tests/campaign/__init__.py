"""The fault campaign: short jobs on a real installation, each with one or two random faults.

``python -m tests.campaign --rounds 1000 --seed 1 --json FILE --html FILE``; see CONTRIBUTING.md.
"""
