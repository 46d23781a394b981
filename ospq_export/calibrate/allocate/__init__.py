"""Which format every operator gets: what each costs the network's output."""
