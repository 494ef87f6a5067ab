"""What a user hands in as parameters."""
