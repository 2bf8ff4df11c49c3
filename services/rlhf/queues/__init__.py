"""Redis Streams: enqueue, consume, acknowledge, reclaim, dead letters; the weights pointer and the replicas' leases."""
