"""Class names and palettes as CSV, and the embedded model."""
