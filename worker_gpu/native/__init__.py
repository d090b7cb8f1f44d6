"""What follows a worker's three int8 products, in C: ``epilogue.c``. See `worker_gpu.epilogue`."""
