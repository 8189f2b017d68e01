"""Asking the stages of runs: an engine that answers many requests at once, OpenAI's protocol, and a page."""
