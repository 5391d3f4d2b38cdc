"""Frameworks that train, ours included, behind one port: a task file in, a run folder out, timed by the same parent."""
