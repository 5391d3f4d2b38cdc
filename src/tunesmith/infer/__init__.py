"""One sampler: batched continuation of prompts with a key/value cache."""
