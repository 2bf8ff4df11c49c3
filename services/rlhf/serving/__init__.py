"""gRPC plumbing that every service shares: server, client, batching, deadlines, auth, errors, drain."""
