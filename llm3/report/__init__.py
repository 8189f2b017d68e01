"""What a run leaves behind: metrics while it trains; a table, plots and a page when it is done."""
