"""Training strategies: callbacks that decide which parameters train when."""
