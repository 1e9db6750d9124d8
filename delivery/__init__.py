"""Delivery: building releases and the archives they are installed from, with the standard library only."""
