"""From a data set's file to packed micro-batches."""
