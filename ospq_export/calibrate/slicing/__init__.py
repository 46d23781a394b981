"""`slicing = "auto"`: candidates and the trials that choose among them."""
