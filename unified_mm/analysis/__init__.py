"""Reports, figures and tables of runs, for a person to look at."""
