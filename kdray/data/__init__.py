"""Prompts and text: sources, tokenisation, ordering, generated tasks."""
