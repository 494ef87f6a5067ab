"""What users of the class hold: the optimizer, its groups, hooks and saved state."""
