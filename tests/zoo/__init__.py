"""The smallest random model of every class that transformers generates text with, and the situations it is tried in."""
