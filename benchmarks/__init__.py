"""Scripts that measure, and what they stored."""
