"""What the commands do, and what they share with the benchmarks: timing, workloads, and what machine this is."""
