"""What every adapter stands on; it knows no method by name."""
