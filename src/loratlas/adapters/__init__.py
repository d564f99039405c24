"""One file a weight-space method."""
