"""Results of an ablation: stored results, statistics, tables and figures."""
