"""What the runs of an ablation came to: kept results, statistics, tables and pictures."""
