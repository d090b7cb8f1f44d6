"""What client and worker both need and nobody must hide. Imports nothing else of the project."""
