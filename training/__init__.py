"""Training: from the data file to the artifacts that serving loads."""
