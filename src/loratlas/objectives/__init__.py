"""One file a loss of training; each is a function of (model, batch, what the model made of it), see `engine.parts`."""
