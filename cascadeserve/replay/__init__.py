"""Open-loop load generator against any KServe v2 server, and the ledger of what became of every request."""
