"""What only some algorithms need."""
