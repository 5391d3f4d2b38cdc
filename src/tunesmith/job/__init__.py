"""The job file: a typed spec (pydantic, unknown keys refused), YAML with line numbers, `--set`, JSON Schema."""
