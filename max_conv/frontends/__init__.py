"""The spellings of other libraries."""
