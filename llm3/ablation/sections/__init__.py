"""The sections of an ablation's report. Each yields paragraphs in Markdown, and figures, from an `Analysis`."""
