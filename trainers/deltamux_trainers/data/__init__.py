"""Data files, and the rows of token ids that they become."""
