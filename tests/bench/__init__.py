"""Cost and latency of serving, against a reference app and against an endpoint that does nothing."""
