"""Running steps: which parameters share a program, and how nothing is lost while it runs."""
