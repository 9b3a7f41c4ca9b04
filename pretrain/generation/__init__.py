"""Speech from text by a trained synthesis head."""
