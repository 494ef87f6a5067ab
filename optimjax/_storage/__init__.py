"""Where arrays lie, and how they are kept."""
