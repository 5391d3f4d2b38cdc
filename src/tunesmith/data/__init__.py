"""Rows in, token rows out: sources, formats, checks, split, tokenizer, template, render, batch. Never imports torch."""
