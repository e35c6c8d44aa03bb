"""Prefixes that have been read, kept for the next prompt that begins alike."""
