"""Bottom layer, standard library only: shared types, on-disk records, errors, strict JSONL, run folders, hashes."""
