"""Models that `transformers` lacks, and the embedded demo model."""
