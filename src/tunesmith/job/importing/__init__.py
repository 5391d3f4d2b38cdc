"""Configurations of other frameworks, read and made into a job file: one table of keys a framework, one engine."""
