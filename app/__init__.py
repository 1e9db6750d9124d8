"""The serving API: from a wine to its predicted quality."""
