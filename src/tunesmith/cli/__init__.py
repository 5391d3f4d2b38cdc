"""Verbs. Parses, calls `tunesmith.api`, prints. Results on stdout, everything else on stderr."""
