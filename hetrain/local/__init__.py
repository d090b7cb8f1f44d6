"""Broker and workers on this machine, started for the length of one job."""
