"""Graph builders: one file per network."""
