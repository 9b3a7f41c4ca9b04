"""Measurements of speed, and proofs on real speech; a package, so that no installed one of this name is imported."""
