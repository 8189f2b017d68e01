"""llm3 trains language models in three stages and shows why there are three."""

__version__ = "0.1.0"
