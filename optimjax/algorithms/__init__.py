"""One file for each algorithm: its equations, its arithmetic for one parameter, its class and its factory."""
