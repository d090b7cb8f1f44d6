"""The connection to Redis or Valkey that client and workers share, and the blobs that lie there."""
