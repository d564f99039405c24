"""What finished adapters contain: read from their files alone, without the base model."""
