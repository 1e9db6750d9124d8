"""The load generator: what its users do, and its own metrics and password."""
