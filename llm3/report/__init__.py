"""The output of a run: metrics while it trains; a table, plots and a page when it is finished."""
