"""Prompts and text: sources, tokenisation, order, generated tasks."""
