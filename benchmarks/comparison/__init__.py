"""What compare.py runs: workloads, and each library's programs for the same measures."""
