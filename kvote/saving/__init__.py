"""Caches and documents as files: which classes hold state, the format, whose file it is, and how it is loaded again."""
