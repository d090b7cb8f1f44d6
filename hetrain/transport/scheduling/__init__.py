"""Which worker gets what: registered workers, routing, partition of products, flow control."""
