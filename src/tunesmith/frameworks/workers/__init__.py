"""Run by other frameworks' interpreters, never imported here: the standard library and the framework suffice."""
