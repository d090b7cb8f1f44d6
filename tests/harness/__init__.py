"""What several tests start or build: processes, split models, engines, forked workers."""
