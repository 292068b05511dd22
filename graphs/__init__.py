"""Graph builders: one file a model."""
